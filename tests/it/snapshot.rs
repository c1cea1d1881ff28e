//! Expected texts in files.

use crate::support::root;

/// Compares with `tests/<path>`. `AMAX_BLESS=1 cargo test` writes the files anew, to be read before they are committed.
/// Blank lines at the end do not count.
#[track_caller]
pub fn check(path: &str, actual: &str) {
    let actual = format!("{}\n", actual.trim_end());
    let file = root("tests").join(path);
    if std::env::var_os("AMAX_BLESS").is_some() {
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, &actual).unwrap();
        return;
    }
    let expected = std::fs::read_to_string(&file).unwrap_or_default();
    let line = expected.lines().zip(actual.lines()).position(|(a, b)| a != b);
    assert!(
        expected == actual,
        "{} differs from line {}; AMAX_BLESS=1 accepts this:\n{actual}",
        file.display(),
        line.unwrap_or_else(|| expected.lines().count().min(actual.lines().count())) + 1
    );
}
