//! torch's threads for our CPU operations: the OpenMP runtime that torch has loaded, by its own entry point.
//!
//! Without it our pool's threads would have to be woken for each small product, on cores where OpenMP's still spin. Only GNU's
//! runtime (which torch's Linux wheels bring) is used; where it is not found, the core's own pool does the work.

use std::ffi::{c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use halfbyte::device::cpu;

/// `GOMP_parallel(fn, data, num_threads, flags)`: what GCC makes of `#pragma omp parallel`. Every thread of the team calls `fn`.
type GompParallel = unsafe extern "C" fn(unsafe extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);

struct Runtime {
    parallel: GompParallel,
    /// The process that found it: a forked child has none of the runtime's threads and would wait for them for ever.
    process: u32,
}

static RUNTIME: OnceLock<Option<Runtime>> = OnceLock::new();

/// Looks for the runtime, once, and has the core use it. To be called when torch has been imported.
pub(crate) fn share_threads() {
    RUNTIME.get_or_init(|| {
        let parallel = find()?;
        cpu::set_executor(execute);
        Some(Runtime { parallel, process: std::process::id() })
    });
}

#[cfg(target_os = "linux")]
fn find() -> Option<GompParallel> {
    let program = libloading::os::unix::Library::this();
    // SAFETY: the symbol is part of GNU OpenMP's stable ABI, with this signature since GCC 4.9.
    let symbol = unsafe { program.get::<GompParallel>(b"GOMP_parallel\0") }.ok()?;
    Some(*symbol)
}

#[cfg(not(target_os = "linux"))]
fn find() -> Option<GompParallel> {
    None
}

/// One parallel region: the threads take numbers until there are none left.
struct Region<'a> {
    task: &'a (dyn Fn(usize) + Sync),
    count: usize,
    next: AtomicUsize,
    panicked: AtomicBool,
}

unsafe extern "C" fn work(region: *mut c_void) {
    // SAFETY: `execute` passes its region, which lives until every thread has returned.
    let region = unsafe { &*region.cast::<Region<'_>>() };
    loop {
        let i = region.next.fetch_add(1, Ordering::Relaxed);
        if i >= region.count {
            return;
        }
        // A panic must not unwind into the runtime's C.
        if catch_unwind(AssertUnwindSafe(|| (region.task)(i))).is_err() {
            region.panicked.store(true, Ordering::Relaxed);
        }
    }
}

fn execute(count: usize, task: &(dyn Fn(usize) + Sync)) -> bool {
    let Some(Some(runtime)) = RUNTIME.get() else { return false };
    if runtime.process != std::process::id() {
        return false;
    }
    let mut region = Region { task, count, next: AtomicUsize::new(0), panicked: AtomicBool::new(false) };
    // SAFETY: `work` takes a region, and this one outlives the call, which returns when all threads have.
    unsafe { (runtime.parallel)(work, (&raw mut region).cast(), count as c_uint, 0) };
    assert!(!region.panicked.load(Ordering::Relaxed), "a task of a CPU operation panicked");
    true
}
