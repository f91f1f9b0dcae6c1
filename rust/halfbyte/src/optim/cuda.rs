//! Steps on CUDA: a whole group of parameters in one launch, from a table of pointers that stays in device memory.
//!
//! Nothing here waits or allocates. The table is kept on the host too, and only what has changed is sent, inside the arguments
//! of a small kernel: so a captured step carries its pointers with it, and no host memory has to stay where it is.

use super::{BLOCK, Common, Hyper, Rule, Scalars};
use crate::device::cuda::{Arguments, Kernel, Launch, Pointer, Stream, device, dtype_index};
use crate::element::Dtype;
use crate::error::{Error, Result};

/// A parameter in device memory and what belongs to it; null for what is not there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Entry {
    /// The parameter and its type.
    pub p: (Pointer, Option<Dtype>),
    /// Its gradient and its type; null to leave the parameter out of the step.
    pub grad: (Pointer, Option<Dtype>),
    /// Number of elements.
    pub n: usize,
    /// Whether states are codes with a scale for each [`BLOCK`], and not fp32.
    pub eight: bool,
    /// States.
    pub states: [Pointer; 3],
    /// Scales of 8-bit states.
    pub absmax: [Pointer; 3],
    /// The parameter proper in fp32.
    pub master: Pointer,
    /// What rounding took away so far, of the type of the parameter.
    pub compensation: Pointer,
    /// Number of steps done, an fp32, where the device counts.
    pub step: Pointer,
    /// Where the sum of squares of the update goes (LARS and LAMB).
    pub update_squares: Pointer,
    /// Number in the group, for random bits.
    pub index: u32,
    /// Whether parameter and gradient are in memory that stays on the device. Copies in bulk are for such memory: a page that the driver
    /// has moved to the host was an illegal address to them.
    pub resident: bool,
    /// Whether states and scales are, all of them.
    pub resident_states: bool,
}

/// Words of an entry, beside the pointer of its gradient.
const WORDS: usize = 12;

/// Words that a launch of `optim_upload` takes.
const MOST_WORDS: usize = 480;

/// Elements from which on a parameter is worked on by tiles on Hopper: with fewer, not every multiprocessor has a tile.
pub const LARGE: usize = 1 << 20;

/// Numbers of parts that a parameter's sums of squares are made of, in cuda/include/optim.cuh.
const SLICES: usize = 32;

/// The table of a group: cuda/include/optim.cuh says what is in it.
#[derive(Debug, Clone, Default)]
pub struct Table {
    count: usize,
    words: Vec<u64>,
    extras: bool,
    /// Whether there are 8-bit states.
    coded: bool,
    /// Whether there are parameters that are worked on by tiles, or there have been.
    tiled: bool,
}

/// Where a group's data are in device memory.
#[derive(Debug, Clone, Copy, Default)]
pub struct Memory {
    /// The table, [`Table::len`] words.
    pub table: Pointer,
    /// [`Scalars`] of each parameter.
    pub each: Pointer,
    /// Sums of squares: [`slices_len`] words.
    pub slices: Pointer,
    /// Sums of squares: a word for each block.
    pub sums: Pointer,
}

/// Words at [`Memory::slices`] for a number of parameters.
pub const fn slices_len(count: usize) -> usize {
    count * SLICES * 2
}

impl Table {
    /// The table of these parameters.
    pub fn new(entries: &[Entry]) -> Self {
        let count = entries.len();
        let mut words = vec![0; count * (WORDS + 2) + 1];
        let mut blocks = 0;
        for (i, entry) in entries.iter().enumerate() {
            words[i] = entry.grad.0;
            words[count * (1 + WORDS) + i] = blocks;
            blocks += entry.n.div_ceil(BLOCK) as u64;
            words[count + i * WORDS..count + (i + 1) * WORDS].copy_from_slice(&entry.words());
        }
        words[count * (WORDS + 2)] = blocks;
        let extras = entries.iter().any(|entry| entry.master != 0 || entry.compensation != 0);
        let coded = entries.iter().any(|entry| entry.eight);
        let tiled = entries.iter().any(Entry::tiled);
        Self { count, words, extras, coded, tiled }
    }

    /// Number of parameters.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Words of the table.
    pub fn len(&self) -> usize {
        self.words.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Blocks of all parameters together.
    pub fn blocks(&self) -> u64 {
        self.words.last().copied().unwrap_or(0)
    }

    /// Puts in another gradient and its type for a parameter.
    pub fn set_grad(&mut self, i: usize, entry: &Entry) {
        self.words[i] = entry.grad.0;
        self.words[self.count + i * WORDS + 9] = entry.about();
        self.tiled |= entry.tiled();
    }

    /// Sends what differs from `before`, which is what is at `memory` already (empty for nothing).
    ///
    /// # Safety
    /// There must be [`Table::len`] words at `memory`, on the stream's device.
    pub unsafe fn send(&self, stream: &Stream, memory: Pointer, before: &[u64]) -> Result<()> {
        /// Words that are compared together where nothing has changed, as it has not in most of a table.
        const STRETCH: usize = 128;
        let differs = |i: usize| before.get(i) != self.words.get(i);
        let mut at = 0;
        while at < self.words.len() {
            let mut stretch = at..self.words.len().min(at + STRETCH);
            if before.get(stretch.clone()) == Some(&self.words[stretch.clone()]) {
                at = stretch.end;
                continue;
            }
            at = stretch.find(|&i| differs(i)).unwrap_or(at);
            let most = self.words.len().min(at + MOST_WORDS);
            let end = (at..most).rev().find(|&i| differs(i)).map_or(at, |last| last + 1);
            // SAFETY: within the table, by the caller's promise.
            unsafe { upload(stream, memory + 8 * at as u64, &self.words[at..end]) }?;
            at = end;
        }
        Ok(())
    }

    /// What the table says.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// `Group` of cuda/include/optim.cuh. No tiles unless a step adds them.
    fn group(&self, memory: &Memory) -> [u64; 2] {
        [memory.table, self.count as u64 | u64::from(self.coded) << 32]
    }
}

impl Entry {
    /// Whether it goes by tiles: it can be copied in bulk, states and scales by lanes if they may leave the device. All begins at multiples
    /// of 16, and tiles are multiples of 16 bytes.
    fn tiled(&self) -> bool {
        let aligned = |pointers: &[Pointer]| pointers.iter().all(|p| p.is_multiple_of(16));
        self.eight
            && self.n >= LARGE
            && self.resident
            && self.p.1 == self.grad.1
            && matches!(self.p.1, Some(Dtype::Bf16 | Dtype::F16))
            && aligned(&[self.p.0, self.grad.0])
            && aligned(&self.states)
            && aligned(&self.absmax)
    }

    /// Types, and which ways are to be taken: `Parameter::about` of cuda/include/optim.cuh.
    fn about(&self) -> u64 {
        let kind = |dtype: Option<Dtype>| dtype.map_or(0, dtype_index) as u64;
        let lie_at = |multiple: u64, pointers: &[Pointer]| pointers.iter().all(|p| p.is_multiple_of(multiple));
        // Eight elements are 16 bytes, or 32, but 8 of codes.
        let aligned = lie_at(16, &[self.p.0, self.grad.0, self.master, self.compensation])
            && lie_at(if self.eight { 8 } else { 16 }, &self.states);
        kind(self.p.1)
            | kind(self.grad.1) << 2
            | u64::from(self.eight) << 4
            | u64::from(aligned) << 5
            | u64::from(self.master != 0) << 6
            | u64::from(self.compensation != 0) << 7
            | u64::from(self.tiled()) << 8
            | u64::from(self.tiled() && !self.resident_states) << 9
            | u64::from(self.index) << 32
    }

    fn words(&self) -> [u64; WORDS] {
        let [s1, s2, s3] = self.states;
        let [a1, a2, a3] = self.absmax;
        let extra = self.master | self.compensation;
        [self.p.0, s1, s2, s3, a1, a2, a3, extra, self.n as u64, self.about(), self.step, self.update_squares]
    }
}

/// Factors of gradients that are on the device, each fp32 × 1 or null.
#[derive(Debug, Clone, Copy, Default)]
pub struct Factors {
    /// Gradients are divided by it.
    pub grad_scale: Pointer,
    /// Where it is not zero, nothing changes.
    pub found_inf: Pointer,
    /// The length of all gradients together, which are shortened to `max_norm`.
    pub total_norm: Pointer,
    /// See `total_norm`.
    pub max_norm: f32,
}

/// The numbers of a step.
#[derive(Debug, Clone, Copy)]
pub enum Numbers {
    /// The same for all parameters.
    Same(Scalars),
    /// At [`Memory::each`].
    Each,
}

static UPLOAD: Kernel = Kernel::new("optim_group", "optim_upload");
static PREPARE: Kernel = Kernel::new("optim_group", "optim_prepare");
static SQUARES: Kernel = Kernel::new("optim_group", "optim_squares");
static REDUCE: Kernel = Kernel::new("optim_group", "optim_reduce");
static REPORT: Kernel = Kernel::new("optim_group", "optim_report");
static TOTAL: Kernel = Kernel::new("optim_group", "optim_total");

/// By law: adam, ademamix, lion, momentum, rmsprop, adagrad.
static STEP: [Kernel; 6] = [
    Kernel::new("optim_adam", "optim_adam"),
    Kernel::new("optim_ademamix", "optim_ademamix"),
    Kernel::new("optim_lion", "optim_lion"),
    Kernel::new("optim_momentum", "optim_momentum"),
    Kernel::new("optim_rmsprop", "optim_rmsprop"),
    Kernel::new("optim_adagrad", "optim_adagrad"),
];

static STEP_WITH_EXTRAS: [Kernel; 6] = [
    Kernel::new("optim_adam", "optim_extras_adam"),
    Kernel::new("optim_ademamix_extras", "optim_extras_ademamix"),
    Kernel::new("optim_lion", "optim_extras_lion"),
    Kernel::new("optim_momentum", "optim_extras_momentum"),
    Kernel::new("optim_rmsprop", "optim_extras_rmsprop"),
    Kernel::new("optim_adagrad", "optim_extras_adagrad"),
];

/// Of the rules with limited updates: LAMB, LARS.
static SUMS: [Kernel; 2] =
    [Kernel::new("optim_adam", "optim_sums_adam"), Kernel::new("optim_momentum", "optim_sums_momentum")];

/// Every kernel of this module, for a test that each is in the images.
#[doc(hidden)]
pub fn kernels() -> Vec<&'static Kernel> {
    let single = [&UPLOAD, &PREPARE, &SQUARES, &REDUCE, &REPORT, &TOTAL];
    single.into_iter().chain(&STEP).chain(&STEP_WITH_EXTRAS).chain(&SUMS).collect()
}

fn law(rule: Rule) -> usize {
    match rule {
        Rule::Adam | Rule::Lamb => 0,
        Rule::AdEMAMix => 1,
        Rule::Lion => 2,
        Rule::Momentum | Rule::Lars => 3,
        Rule::RmsProp => 4,
        Rule::Adagrad => 5,
    }
}

/// The number of a rule in cuda/src/optim_group.cu.
fn number(rule: Rule) -> u32 {
    match rule {
        Rule::Adam => 0,
        Rule::AdEMAMix => 1,
        Rule::Lion => 2,
        Rule::Momentum => 3,
        Rule::Lars => 4,
        Rule::Lamb => 5,
        Rule::RmsProp => 6,
        Rule::Adagrad => 7,
    }
}

/// What the kernels of cuda/src/optim.cu for rules with a number of states have, on Hopper and later or before.
struct Geometry {
    /// Warps of a kernel without extras.
    warps: u32,
    /// Bytes of shared memory that each warp has to itself.
    slot: u32,
    /// Bytes of shared memory of a group with 8-bit states.
    direct: u32,
    /// The same with places for tiles.
    tiled: u32,
}

impl Geometry {
    const fn of(hopper: bool, states: u32) -> Self {
        // Blocks of a tile, and tiles at a time. A warp more copies them.
        let (tile, depth) = match (hopper, states) {
            (true, 1) => (24, 4),
            (true, 2) => (24, 3),
            (true, _) => (20, 3),
            (false, _) => (0, 0),
        };
        let warps = match (hopper, states) {
            (true, _) => tile + 1,
            (false, 1 | 2) => 24,
            (false, _) => 20,
        };
        let slot = if hopper { 216 } else { 184 };
        let barriers = depth * (16 + 8 * (1 + 2 * states));
        let (signed, unsigned) = (4 * 2 * 1729, 4 * 3457);
        let maps = if states > 1 { 2 } else { 1 };
        let tables = slot * warps + barriers + signed + (maps - 1) * unsigned;
        let row = if hopper { 256 } else { 8 * 4 * maps };
        let direct = tables.next_multiple_of(128) + 256 * row;
        Self { warps, slot, direct, tiled: direct + depth * (tile * (1024 + states * 260)).next_multiple_of(128) }
    }
}

/// The launch of a kernel of cuda/src/optim.cu for some blocks of a group, and whether large parameters go by tiles.
fn launch(
    kernel: &Kernel,
    stream: &Stream,
    rule: Rule,
    extras: bool,
    table: &Table,
    blocks: u64,
    tiles: bool,
) -> Result<(Launch, bool)> {
    const EXTRAS_THREADS: u32 = 512;
    let device = device(stream.device)?;
    let hopper = device.capability >= 90;
    let Geometry { warps, slot, direct, tiled } = Geometry::of(hopper, rule.signed().len() as u32);
    let tiles = tiles && table.tiled && hopper && tiled <= device.shared_memory;
    let threads = if extras { EXTRAS_THREADS } else { 32 * warps };
    // More warps than these ask for 32-bit states faster than the memory likes.
    let used = if table.coded || !hopper { threads } else { threads.min(512) };
    // How many blocks there are at once is asked for with what 8-bit states take, so that it is the same for both.
    let launch = kernel.filling(stream.device, blocks.div_ceil(u64::from(used / 32)), threads, direct)?;
    let shared = match (table.coded, tiles) {
        (false, _) => slot * warps,
        (true, false) => direct,
        (true, true) => tiled,
    };
    Ok((Launch { threads: used, shared, ..launch }, tiles))
}

/// # Safety
/// There must be room for the words at `to`.
unsafe fn upload(stream: &Stream, to: Pointer, words: &[u64]) -> Result<()> {
    let mut padded = [0u64; MOST_WORDS];
    padded[..words.len()].copy_from_slice(words);
    let (mut to, mut count) = (to, words.len() as u32);
    let mut pointers = [(&raw mut to).cast(), (&raw mut count).cast(), (&raw mut padded).cast()];
    // SAFETY: the arguments are those of the kernel; the caller vouches for the memory.
    unsafe { UPLOAD.launch_pointers(stream, Launch::new((1, 1), 128), &mut pointers) }
}

/// The bits of `value` as 64-bit words.
fn words_of<T: Copy, const N: usize>(value: &T) -> [u64; N] {
    assert_eq!(size_of::<T>(), 8 * N, "a whole number of words");
    let mut words = [0; N];
    // SAFETY: `T` is a struct of plain numbers without padding (`Hyper`, `Scalars`), as long as `words`.
    unsafe { std::ptr::copy_nonoverlapping(std::ptr::from_ref(value).cast::<u8>(), words.as_mut_ptr().cast(), 8 * N) };
    words
}

/// Sends the numbers of each parameter, for groups whose parameters have done different numbers of steps.
///
/// # Safety
/// There must be room at [`Memory::each`].
pub unsafe fn send_numbers(stream: &Stream, memory: &Memory, numbers: &[Scalars]) -> Result<()> {
    let words: Vec<u64> = numbers.iter().flat_map(words_of::<_, 8>).collect();
    for (i, part) in words.chunks(MOST_WORDS).enumerate() {
        // SAFETY: the caller's promise.
        unsafe { upload(stream, memory.each + (8 * MOST_WORDS * i) as u64, part) }?;
    }
    Ok(())
}

/// Counts a step of every parameter that has a gradient on the device, and makes the numbers at [`Memory::each`]. The learning
/// rate is at `lr`, or if that is null in `hyper`.
///
/// # Safety
/// The table must have been sent, with a count of steps for every parameter, and `memory` be of the table.
pub unsafe fn prepare(
    stream: &Stream,
    rule: Rule,
    table: &Table,
    memory: &Memory,
    hyper: &Hyper,
    lr: Pointer,
    found_inf: Pointer,
) -> Result<()> {
    let mut arguments = Arguments::default()
        .block(&table.group(memory))
        .block(&words_of::<_, 16>(hyper))
        .u32(number(rule))
        .u64(lr)
        .u64(found_inf)
        .u64(memory.each);
    let launch = Launch::new(((table.count as u32).div_ceil(128), 1), 128);
    // SAFETY: the arguments are those of the kernel; the caller vouches for the pointers.
    unsafe { PREPARE.launch(stream, launch, &mut arguments) }
}

/// One step of blocks `from` up to `to` of a group, or of all. Rules with limited updates need all of them.
///
/// # Safety
/// The table must have been sent, its pointers be device memory (or managed, or mapped) of the right sizes until the stream has
/// passed the launches, and `memory` be of the table.
pub unsafe fn step(
    stream: &Stream,
    rule: Rule,
    table: &Table,
    memory: &Memory,
    numbers: &Numbers,
    common: &Common,
    factors: &Factors,
    range: Option<(u64, u64)>,
) -> Result<()> {
    if table.blocks() > u64::from(u32::MAX) / 2 {
        return Err(Error::value("params", "fewer than 2^39 elements in a group", table.blocks() * BLOCK as u64));
    }
    let (from, to) = range.unwrap_or((0, table.blocks()));
    if from >= to {
        return Ok(());
    }
    let (same, each) = match numbers {
        Numbers::Same(scalars) => (*scalars, 0),
        Numbers::Each => (Scalars::default(), memory.each),
    };
    let request = |slices: Pointer, tiles: bool| {
        let mut words = Vec::with_capacity(24);
        words.extend(table.group(memory));
        words[1] |= u64::from(tiles) << 33;
        words.extend(words_of::<_, 8>(&same));
        words.push(each);
        words.push(u64::from(common.scale.to_bits()) | u64::from(factors.max_norm.to_bits()) << 32);
        words.extend([factors.grad_scale, factors.total_norm, factors.found_inf]);
        words.push(common.seed.unwrap_or(0));
        words.push(slices);
        words.extend([from, to]);
        words.push(u64::from(common.skip_zeros) | u64::from(common.seed.is_some()) << 32);
        words
    };
    let extras = table.extras || common.seed.is_some();
    let mut slices = 0;
    if rule.has_trust() {
        let kernel = &SUMS[usize::from(rule == Rule::Lars)];
        let (launch, _) = launch(kernel, stream, rule, false, table, to - from, false)?;
        let mut arguments = Arguments::default().block(&request(0, false)).u64(memory.sums);
        // SAFETY: the arguments are those of the kernel; the caller vouches for the pointers.
        unsafe { kernel.launch(stream, launch, &mut arguments) }?;
        // SAFETY: as above.
        unsafe { reduce(stream, table, memory) }?;
        slices = memory.slices;
    }
    let kernel = if extras { &STEP_WITH_EXTRAS[law(rule)] } else { &STEP[law(rule)] };
    let (launch, tiles) = launch(kernel, stream, rule, extras, table, to - from, !extras && !common.skip_zeros)?;
    // SAFETY: as above.
    unsafe { kernel.launch(stream, launch, &mut Arguments::default().block(&request(slices, tiles))) }?;
    if rule.has_trust() {
        let mut arguments = Arguments::default()
            .block(&table.group(memory))
            .block(&words_of::<_, 8>(&same))
            .u64(each)
            .u64(memory.slices);
        // SAFETY: as above.
        unsafe { REPORT.launch(stream, Launch::new(((table.count as u32).div_ceil(4), 1), 128), &mut arguments) }?;
    }
    Ok(())
}

/// # Safety
/// As [`step`].
unsafe fn reduce(stream: &Stream, table: &Table, memory: &Memory) -> Result<()> {
    let launch = Launch::new((SLICES as u32, table.count.clamp(1, 65535) as u32), 256);
    let mut arguments = Arguments::default().block(&table.group(memory)).u64(memory.sums).u64(memory.slices);
    // SAFETY: the arguments are those of the kernel; the caller vouches for the pointers.
    unsafe { REDUCE.launch(stream, launch, &mut arguments) }
}

/// Adds the squares of all gradients of a group to the fp64 at `total`, or puts them there if the group `is_first`; and the root
/// of the total to the fp32 at `root`, if that is not null. The same bits every time.
///
/// # Safety
/// As [`step`]; `total` and `root` must be device memory.
pub unsafe fn add_squares(
    stream: &Stream,
    table: &Table,
    memory: &Memory,
    total: Pointer,
    is_first: bool,
    root: Pointer,
) -> Result<()> {
    let launch = SQUARES.filling(stream.device, table.blocks().div_ceil(8), 256, 0)?;
    let mut arguments = Arguments::default().block(&table.group(memory)).u64(memory.sums);
    // SAFETY: the arguments are those of the kernels; the caller vouches for the pointers.
    unsafe { SQUARES.launch(stream, launch, &mut arguments) }?;
    // SAFETY: as above.
    unsafe { reduce(stream, table, memory) }?;
    let mut arguments = Arguments::default()
        .u64(memory.slices)
        .u64((table.count * SLICES) as u64)
        .u64(total)
        .u32(u32::from(is_first))
        .u64(root);
    // SAFETY: as above.
    unsafe { TOTAL.launch(stream, Launch::new((1, 1), 256), &mut arguments) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernels assert of themselves when they are compiled.
    #[test]
    fn shared_memory_is_what_the_kernels_have() {
        let bytes = |hopper| [1, 2, 3].map(|states| Geometry::of(hopper, states).tiled);
        assert_eq!(bytes(true), [208_384, 210_176, 206_336]);
        assert_eq!(bytes(false), [26_496, 48_512, 47_744]);
        // GPUs whose blocks have 99 KB do without tiles.
        for states in 1..=3 {
            assert!(Geometry::of(true, states).direct <= 99 << 10);
        }
    }

    fn entry(n: usize) -> Entry {
        let (p, grad) = ((1 << 20, Some(Dtype::Bf16)), (1 << 30, Some(Dtype::Bf16)));
        Entry {
            p,
            grad,
            n,
            eight: true,
            states: [1 << 8, 1 << 9, 0],
            absmax: [1 << 10, 1 << 11, 0],
            resident: true,
            resident_states: true,
            ..Entry::default()
        }
    }

    #[test]
    fn tiles_are_for_large_parameters_that_can_be_copied_in_bulk() {
        let large = entry(LARGE);
        let none = [
            entry(LARGE - 1),
            Entry { eight: false, ..large },
            Entry { resident: false, ..large },
            Entry { grad: (large.grad.0, Some(Dtype::F16)), ..large },
            Entry { p: (large.p.0, Some(Dtype::F32)), grad: (large.grad.0, Some(Dtype::F32)), ..large },
            Entry { p: (large.p.0 + 8, large.p.1), ..large },
            Entry { grad: (large.grad.0 + 8, large.grad.1), ..large },
            Entry { states: [large.states[0], large.states[1] + 8, 0], ..large },
            Entry { absmax: [large.absmax[0] + 4, large.absmax[1], 0], ..large },
        ];
        assert!(large.tiled() && large.about() & (256 | 512) == 256);
        let paged = Entry { resident_states: false, ..large };
        assert!(paged.tiled() && paged.about() == large.about() | 512);
        for other in none {
            let other = Entry { resident_states: false, ..other };
            assert!(!other.tiled() && other.about() & (256 | 512) == 0, "{other:?}");
        }
        let small = Table::new(&none);
        assert!(!small.tiled);
        let mut table = Table::new(&[entry(100), none[5]]);
        table.set_grad(1, &large);
        assert!(table.tiled);
    }
}
