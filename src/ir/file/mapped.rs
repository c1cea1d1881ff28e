//! Mapped files, and which of their pages are held in memory.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use memmap2::Mmap;

/// Addresses of the files that are mapped now.
static MAPS: Mutex<Vec<Range<usize>>> = Mutex::new(Vec::new());

fn maps() -> MutexGuard<'static, Vec<Range<usize>>> {
    MAPS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn addresses(bytes: &[u8]) -> Range<usize> {
    let start = bytes.as_ptr().addr();
    start..start + bytes.len()
}

/// A map that is listed while it lives.
struct Listed(Mmap);

impl AsRef<[u8]> for Listed {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        let own = addresses(&self.0);
        maps().retain(|range| *range != own);
    }
}

/// The bytes of a map.
pub(in crate::ir) fn share(map: Mmap) -> Bytes {
    maps().push(addresses(&map));
    Bytes::from_owner(Listed(map))
}

/// Whether `bytes` are a slice of a mapped file.
pub(in crate::ir) fn is_mapped(bytes: &[u8]) -> bool {
    holds(&maps(), &addresses(bytes))
}

fn holds(maps: &[Range<usize>], wanted: &Range<usize>) -> bool {
    maps.iter().any(|map| map.start <= wanted.start && wanted.end <= map.end)
}

/// Gives the memory of `bytes` back to the system where they are a slice of a mapped file: their pages are read from the
/// file again when they are next looked at. Whoever has copied a weight calls this, or else a process holds large
/// models twice. Bytes of other kinds are left alone.
pub fn release(bytes: &[u8]) {
    #[cfg(unix)]
    {
        // Below this the calls cost more than the memory is worth.
        const LEAST: usize = 1 << 18;
        if bytes.len() < LEAST {
            return;
        }
        let wanted = addresses(bytes);
        let maps = maps();
        if !holds(&maps, &wanted) {
            return;
        }
        let page = page_size();
        let (start, end) = (wanted.start.next_multiple_of(page), wanted.end / page * page);
        if start < end {
            let first = bytes[start - wanted.start..].as_ptr();
            // SAFETY: the range is within a read-only map of a file, which `maps` keeps from being unmapped meanwhile.
            // Its pages are clean, so dropping them changes nothing that anybody can read.
            #[allow(unsafe_code, reason = "advice on a mapped file")]
            unsafe {
                libc::madvise(first.cast_mut().cast(), end - start, libc::MADV_DONTNEED);
            }
        }
    }
    #[cfg(not(unix))]
    let _ = bytes;
}

/// Bytes in a page of memory.
#[cfg(unix)]
fn page_size() -> usize {
    // SAFETY: it takes a number and returns one.
    #[allow(unsafe_code, reason = "the standard library does not ask for it")]
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).ok().filter(|size| size.is_power_of_two()).unwrap_or(1 << 16)
}

#[cfg(all(test, target_os = "linux"))]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
mod tests {
    use std::io::Write;

    /// Bytes of files that this process holds in memory.
    fn held() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|l| l.starts_with("RssFile")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
    }

    #[test]
    #[allow(unsafe_code, reason = "a mapped file")]
    fn released_pages_leave_memory_and_come_back() {
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..64u32 << 18).flat_map(u32::to_le_bytes).collect();
        file.write_all(&content).unwrap();
        // SAFETY: nobody else has the file.
        let bytes = super::share(unsafe { memmap2::Mmap::map(&file) }.unwrap());
        assert!(bytes[..] == content[..]);
        let before = held();
        super::release(&bytes[7..]);
        assert!(held() + (60 << 20) < before, "{before} -> {}", held());
        assert!(bytes[..] == content[..]);
        super::release(&content);
        assert_eq!(content[4..8], 1u32.to_le_bytes());
        let own = super::addresses(&bytes);
        drop(bytes);
        assert!(!super::maps().contains(&own));
    }
}
