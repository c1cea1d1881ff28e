//! What the machine has: processors, and memory for this process.

/// How many processors the process may use; 1 where that is not known.
#[must_use]
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get)
}

/// Bytes of memory that the process can have at most, or `u64::MAX` where that is not known: what the machine has, what its
/// control group may use, and the limit of its addresses.
pub(crate) fn memory() -> u64 {
    [physical(), control_group(), addresses()].into_iter().flatten().min().unwrap_or(u64::MAX)
}

#[cfg(unix)]
#[allow(unsafe_code, reason = "the standard library does not ask the system for this")]
fn physical() -> Option<u64> {
    // SAFETY: sysconf takes no pointers.
    let [pages, size] = [libc::_SC_PHYS_PAGES, libc::_SC_PAGESIZE].map(|name| unsafe { libc::sysconf(name) });
    u64::try_from(pages).ok()?.checked_mul(u64::try_from(size).ok()?)
}

#[cfg(unix)]
#[allow(unsafe_code, reason = "the standard library does not ask the system for this")]
fn addresses() -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit lives until it returns.
    let status = unsafe { libc::getrlimit(libc::RLIMIT_AS, &raw mut limit) };
    (status == 0).then_some(limit.rlim_cur)
}

#[cfg(not(unix))]
fn physical() -> Option<u64> {
    None
}

#[cfg(not(unix))]
fn addresses() -> Option<u64> {
    None
}

fn control_group() -> Option<u64> {
    std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok()?.trim().parse().ok()
}
