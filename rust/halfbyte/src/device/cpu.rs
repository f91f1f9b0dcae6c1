//! The CPU: which vector instructions it has, and threads to share work among.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;

use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex, OnceLock};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{Error, Result};

/// A set of vector instructions that there is code for. Later ones contain earlier ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// What every CPU of the target has.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL besides.
    Avx512,
}

impl Level {
    /// All levels, lowest first.
    pub const ALL: [Self; 3] = [Self::Scalar, Self::Avx2, Self::Avx512];

    /// The name that `HALFBYTE_SIMD` takes: `scalar`, `avx2` or `avx512`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// The inverse of [`Level::name`].
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|l| l.name() == name)
    }

    /// An error unless this CPU has the instructions. Whoever calls code compiled for a level asks this first.
    pub fn check(self) -> Result<()> {
        if self <= highest() {
            return Ok(());
        }
        Err(Error::value("level", format!("at most {} on this CPU", highest().name()), self.name()))
    }
}

/// The highest level that this CPU has. Detected once.
fn highest() -> Level {
    static HIGHEST: LazyLock<Level> = LazyLock::new(detect);
    *HIGHEST
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    match (avx2, avx512) {
        (true, true) => Level::Avx512,
        (true, false) => Level::Avx2,
        (false, _) => Level::Scalar,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Level {
    Level::Scalar
}

/// The level that operations use: the highest that this CPU has, or a lower one named in the environment variable
/// `HALFBYTE_SIMD` (read once; a name that does not exist or a level that this CPU lacks changes nothing).
pub fn level() -> Level {
    static LEVEL: LazyLock<Level> = LazyLock::new(|| {
        let asked = std::env::var("HALFBYTE_SIMD").ok().and_then(|name| Level::from_name(&name));
        asked.map_or(highest(), |asked| asked.min(highest()))
    });
    *LEVEL
}

/// The levels that this CPU has, lowest first.
pub fn available_levels() -> Vec<Level> {
    Level::ALL.into_iter().filter(|&l| l <= highest()).collect()
}

/// Zero stands for "as many as there are cores".
static THREADS: AtomicUsize = AtomicUsize::new(0);

/// Sets in how many parts operations divide their work from now on. Zero brings the default back: one a core.
pub fn set_threads(threads: usize) {
    THREADS.store(threads, Ordering::Relaxed);
}

/// In how many parts operations divide their work. Results do not depend on it.
pub fn threads() -> usize {
    match THREADS.load(Ordering::Relaxed) {
        0 => cores(),
        set => set,
    }
}

fn cores() -> usize {
    static CORES: OnceLock<usize> = OnceLock::new();
    *CORES.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// How many of `units` units of work go to one task: an equal share for each thread, but at least `grain`, below which
/// waking a thread costs more than it brings.
pub(crate) fn share(units: usize, grain: usize) -> usize {
    units.div_ceil(threads()).max(grain).max(1)
}

/// Threads of the host program to work on: calls its second argument once with each number below its first, from any
/// threads, and returns true when all calls have returned; or false at once, and then the pool of this crate does the work.
pub type Executor = fn(usize, &(dyn Fn(usize) + Sync)) -> bool;

static EXECUTOR: OnceLock<Executor> = OnceLock::new();

/// Has operations work on threads of the host program from now on; the first one to be set stays.
///
/// Two pools in one process fight for the cores: OpenMP's threads spin for a while after each of torch's operations, and a
/// thread of ours has to be woken, which for a small product takes longer than the product.
pub fn set_executor(executor: Executor) {
    EXECUTOR.get_or_init(|| executor);
}

/// Runs `body` on every task, on the threads of the executor if there is one. Returns when all are done.
pub(crate) fn for_each_task<T: Send>(tasks: Vec<T>, body: impl Fn(T) + Sync) {
    match EXECUTOR.get() {
        Some(executor) if tasks.len() > 1 => {
            let slots: Vec<_> = tasks.into_iter().map(|task| Mutex::new(Some(task))).collect();
            let run = |i: usize| {
                if let Some(task) = slots[i].lock().ok().and_then(|mut slot| slot.take()) {
                    body(task);
                }
            };
            if !executor(slots.len(), &run) {
                let left = slots.into_iter().filter_map(|slot| slot.into_inner().ok().flatten());
                for_each_on_pool(left.collect(), body);
            }
        }
        _ => for_each_on_pool(tasks, body),
    }
}

/// The first task on the caller's thread, the others on the pool.
fn for_each_on_pool<T: Send>(tasks: Vec<T>, body: impl Fn(T) + Sync) {
    let parallel = if tasks.len() > 1 { pool() } else { None };
    let Some(pool) = parallel else {
        return tasks.into_iter().for_each(body);
    };
    let body = &body;
    let mut tasks = tasks.into_iter();
    let mine = tasks.next();
    pool.in_place_scope(|scope| {
        for task in tasks {
            scope.spawn(move |_| body(task));
        }
        mine.map(body);
    });
}

/// A pool and the process that its threads live in.
struct Pool {
    process: u32,
    threads: ThreadPool,
}

/// Made at first use. A forked child inherits the pool's memory but none of its threads, and would wait for them for
/// ever; so it makes its own and forgets the parent's. No lock is held here that a fork could leave locked.
static POOL: AtomicPtr<Pool> = AtomicPtr::new(ptr::null_mut());

/// The pool of this process, or `None` where threads cannot be had.
fn pool() -> Option<&'static ThreadPool> {
    let process = std::process::id();
    let found = POOL.load(Ordering::Acquire);
    // SAFETY: `POOL` is null or came from `Box::into_raw` below, and what it has pointed to is never freed.
    if let Some(pool) = unsafe { found.as_ref() }.filter(|pool| pool.process == process) {
        return Some(&pool.threads);
    }
    // The caller works too, so one thread fewer than cores.
    let workers = cores().saturating_sub(1).max(1);
    let threads =
        ThreadPoolBuilder::new().num_threads(workers).thread_name(|i| format!("halfbyte-{i}")).build().ok()?;
    let made = Box::into_raw(Box::new(Pool { process, threads }));
    match POOL.compare_exchange(found, made, Ordering::AcqRel, Ordering::Acquire) {
        // SAFETY: `made` was just leaked, and nothing frees what `POOL` points to.
        Ok(_) => Some(unsafe { &(*made).threads }),
        Err(other) => {
            // SAFETY: `made` was never shared, so it is still ours to take back.
            drop(unsafe { Box::from_raw(made) });
            // SAFETY: another thread of this process got here first; what it stored is never freed.
            Some(unsafe { &(*other).threads })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_go_by_name_and_start_with_scalar() {
        for level in Level::ALL {
            assert_eq!(Level::from_name(level.name()), Some(level));
        }
        assert_eq!(available_levels()[0], Level::Scalar);
        assert!(available_levels().contains(&level()));
        assert!(Level::Scalar.check().is_ok());
    }

    #[test]
    fn every_task_runs_once() {
        for count in [0, 1, 2, 7, 100] {
            let ran: Vec<_> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            for_each_task(ran.iter().collect(), |counter| {
                counter.fetch_add(1, Ordering::Relaxed);
            });
            assert!(ran.iter().all(|counter| counter.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn an_executor_gets_every_task_or_leaves_them_all() {
        fn takes(count: usize, task: &(dyn Fn(usize) + Sync)) -> bool {
            // A prime count is left to the pool, so that both ways run whatever the order of the tests.
            let taken = count != 7;
            (0..count).filter(|_| taken).for_each(task);
            taken
        }
        set_executor(takes);
        for count in [2, 7, 100] {
            let ran: Vec<_> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            for_each_task(ran.iter().collect(), |counter| {
                counter.fetch_add(1, Ordering::Relaxed);
            });
            assert!(ran.iter().all(|counter| counter.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn work_is_shared_in_parts_of_at_least_the_grain() {
        assert_eq!(share(10, 1000), 1000);
        assert_eq!(share(0, 0), 1);
        assert!(share(1_000_000, 1000) >= 1_000_000 / threads());
    }
}
