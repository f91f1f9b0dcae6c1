//! What is known of weights between launches: which comes after which, and that nobody writes them any more.
//!
//! A decoder's layers run in the same order at every step, and between two of them memory has little to do: norms, rotations and attention
//! read next to nothing. Who knows the order says it here once; the streaming kernel then asks the L2 for the begin of the next weights while it
//! ends. Nothing else changes: a hint that is wrong costs time, never a result.
//!
//! That weights are settled is another kind of word: a launch then reads them while the one ahead of it still runs (programmatic dependent
//! launch), and what that one wrote may not be seen.

use std::collections::BTreeMap;
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::device::cuda::Pointer;
use crate::error::{Error, Result};

/// Tensors that are fetched for the next launch.
const TENSORS: usize = 2;

/// A tensor of the next launch: packed weights or scales.
#[derive(Debug, Clone, Copy)]
pub struct NextRead {
    /// Where it begins.
    pub address: Pointer,
    /// Its rows, one behind the other: those of the weight.
    pub rows: usize,
    /// Bytes of a row.
    pub row_bytes: usize,
}

/// `NextRows` of the kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct NextRows {
    address: Pointer,
    rows: u32,
    stride: u32,
    bytes: u32,
    log2_lanes: u32,
}

type Hint = [NextRows; TENSORS];

/// `Next` of the kernel, in 64-bit words: what a launch is given.
type Words = [u64; WORDS];
const WORDS: usize = 3 * TENSORS;

/// What has been said of a weight.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Said {
    /// `Next` of the kernel; zeros for nothing.
    pub(super) words: Words,
    /// Whether it may be read before the launch ahead is done.
    pub(super) settled: bool,
}

static SAID: RwLock<BTreeMap<Pointer, Said>> = RwLock::new(BTreeMap::new());
/// Whether there is anything: in most processes there is not, and their launches do not look.
static ANY: AtomicBool = AtomicBool::new(false);

fn say(packed: Pointer, change: impl FnOnce(&mut Said)) {
    let mut all = SAID.write().unwrap_or_else(std::sync::PoisonError::into_inner);
    let said = all.entry(packed).or_default();
    change(said);
    if *said == Said::default() {
        all.remove(&packed);
    }
    ANY.store(!all.is_empty(), Ordering::Release);
}

/// Says that after a product with the weight at `packed` the next one reads `next`: packed weights and their scales. Products of up to 16 rows
/// on compute capability 9.0 then fetch at most `most` bytes of it, of each row the begin. `None` forgets what was said, which is to be done when
/// either weight's memory is given back; until then launches, also those in graphs, ask for memory that may be somebody else's, or nobody's:
/// which costs time and does no harm.
///
/// # Errors
/// Rows of 4 GiB or more, or as many rows.
pub fn read_next(packed: Pointer, next: Option<[NextRead; TENSORS]>, most: usize) -> Result<()> {
    let hint = next.map(|next| hint(&next, most)).transpose()?.flatten();
    say(packed, |said| said.words = hint.map_or([0; WORDS], |hint| words_of(&hint)));
    Ok(())
}

/// Says that the weight at `packed` and its scales are settled, or (false) that they no longer are: nothing that the GPU still has to do writes
/// them, nor will anything that is enqueued later. Products of up to 16 rows on compute capability 9.0 then read them before the kernel that is
/// ahead in the stream has ended, whatever that is. To be taken back before such a weight is written, moved or given back.
pub fn settle(packed: Pointer, settled: bool) {
    say(packed, |said| said.settled = settled);
}

fn hint(next: &[NextRead; TENSORS], most: usize) -> Result<Option<Hint>> {
    let all = next.iter().map(|read| read.rows as u128 * read.row_bytes as u128).sum::<u128>();
    let mut hint = Hint::default();
    for (to, read) in hint.iter_mut().zip(next) {
        let narrow =
            |what: usize| u32::try_from(what).map_err(|_| Error::value("next", "rows of less than 4 GiB", what));
        let (rows, stride) = (narrow(read.rows)?, narrow(read.row_bytes)?);
        let share = if all <= most as u128 { u128::from(stride) } else { u128::from(stride) * most as u128 / all };
        // Whole sectors, unless it is the whole row.
        let bytes = if share == u128::from(stride) { stride } else { share as u32 / 32 * 32 };
        if rows == 0 || bytes == 0 {
            continue;
        }
        let log2_lanes = bytes.div_ceil(128).next_power_of_two().trailing_zeros().min(5);
        *to = NextRows { address: read.address, rows, stride, bytes, log2_lanes };
    }
    Ok((hint != Hint::default()).then_some(hint))
}

fn words_of(hint: &Hint) -> Words {
    let mut words = [0; WORDS];
    for (words, rows) in words.chunks_exact_mut(3).zip(hint) {
        words[0] = rows.address;
        words[1] = u64::from(rows.rows) | u64::from(rows.stride) << 32;
        words[2] = u64::from(rows.bytes) | u64::from(rows.log2_lanes) << 32;
    }
    words
}

/// What a launch that is a product with the weight at `packed` may go by.
pub(super) fn said_of(packed: Pointer) -> Said {
    if !ANY.load(Ordering::Acquire) {
        return Said::default();
    }
    let all = SAID.read().unwrap_or_else(std::sync::PoisonError::into_inner);
    all.get(&packed).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(rows: usize, row_bytes: usize) -> NextRead {
        NextRead { address: 0x1000, rows, row_bytes }
    }

    #[test]
    fn what_fits_is_fetched_whole() {
        let found = hint(&[read(10, 300), read(10, 8)], 4000).unwrap().unwrap();
        assert_eq!((found[0].bytes, found[0].log2_lanes), (300, 2));
        assert_eq!((found[1].bytes, found[1].log2_lanes), (8, 0));
    }

    #[test]
    fn of_more_the_begin_of_each_row() {
        let most = 16 << 20;
        let found = hint(&[read(28672, 2048), read(28672, 256)], most).unwrap().unwrap();
        let fetched = found.iter().map(|rows| rows.rows as usize * rows.bytes as usize).sum::<usize>();
        assert!(fetched <= most && fetched > most * 8 / 10);
        assert_eq!(found[0].bytes % 32, 0);
        assert!(found[0].bytes / found[1].bytes >= 7);
    }

    #[test]
    fn nothing_is_no_hint_and_too_much_refused() {
        assert!(hint(&[read(0, 100), read(0, 0)], 100).unwrap().is_none());
        assert!(hint(&[read(1 << 20, 64), read(1 << 20, 4)], 100).unwrap().is_none());
        assert!(hint(&[read(1, 1 << 32), read(1, 1)], 100).is_err());
        assert!(hint(&[read(1 << 32, 1), read(1, 1)], 100).is_err());
    }

    #[test]
    fn what_is_said_is_kept_by_address_until_it_is_taken_back() {
        let (first, second) = (0xabc0_0000_0100, 0xabc0_0000_0200);
        read_next(first, Some([read(10, 300), read(10, 8)]), 4000).unwrap();
        let words = |low: u64, high: u64| low | high << 32;
        let expected = [0x1000, words(10, 300), words(300, 2), 0x1000, words(10, 8), words(8, 0)];
        assert_eq!(said_of(first), Said { words: expected, settled: false });
        assert_eq!(said_of(second), Said::default());
        settle(first, true);
        assert_eq!(said_of(first), Said { words: expected, settled: true });
        read_next(first, None, 0).unwrap();
        assert_eq!(said_of(first), Said { settled: true, ..Said::default() });
        settle(first, false);
        assert_eq!(said_of(first), Said::default());
    }
}
