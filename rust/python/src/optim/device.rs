//! Steps on CUDA.

use halfbyte::optim::cuda::{self, Entry, Factors, Memory as Places, Numbers, Table};
use halfbyte::optim::{Rule, Scalars};
use std::ops::Range;

use halfbyte::device::cuda::{Stream, capture_of, is_resident, memory_left, prefetch};
use halfbyte::optim::BLOCK;
use halfbyte::{Dtype, Error};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyInt};

use super::options::Options;
use super::slot::{Gradient, Slot, count_steps, tensor};
use crate::dlpack::{Place, TensorRef};
use crate::errors::raise;

/// Device memory of a plan: the table of pointers and what is computed beside it.
#[derive(Default)]
pub(super) struct Memory {
    eager: Buffers,
    /// One for each capture, which reads and writes it whenever its graph is replayed.
    captured: Vec<(u64, Buffers)>,
    table: Table,
    entries: Vec<Entry>,
    left: Left,
}

/// Whether there is so little memory left on a device that paged states may have left it. The driver takes its time to say, so that it is
/// asked at the first step, at every [`Left::EACH`]th, and at all that come while there is little: a step that does not know yet has its pages
/// one by one.
#[derive(Default)]
struct Left {
    steps: u32,
    is_short: bool,
}

impl Left {
    const EACH: u32 = 16;

    fn is_short(&mut self, device: i32) -> Result<bool, Error> {
        if self.is_short || self.steps.is_multiple_of(Self::EACH) {
            let (free, total) = memory_left(device)?;
            self.is_short = free < total / 32;
        }
        self.steps = self.steps.wrapping_add(1);
        Ok(self.is_short)
    }
}

#[derive(Default)]
struct Buffers {
    /// Tensors of bytes.
    table: Option<Py<PyAny>>,
    sums: Option<Py<PyAny>>,
    places: Places,
    /// What has been sent to the table.
    sent: Vec<u64>,
}

/// A tensor of `words` 64-bit words on a device, and its address.
pub(super) fn allocate(py: Python<'_>, device: i32, words: usize) -> PyResult<(Py<PyAny>, u64)> {
    let torch = py.import(intern!(py, "torch"))?;
    let keywords = PyDict::new(py);
    keywords.set_item(intern!(py, "dtype"), torch.getattr(intern!(py, "uint8"))?)?;
    keywords.set_item(intern!(py, "device"), torch.getattr(intern!(py, "device"))?.call1(("cuda", device))?)?;
    let made = torch.getattr(intern!(py, "empty"))?.call((words * 8,), Some(&keywords))?;
    let address = tensor("table", &made)?.address() as u64;
    Ok((made.unbind(), address))
}

impl Buffers {
    /// Makes room for a table, and for sums if they are wanted.
    fn reserve(&mut self, py: Python<'_>, device: i32, table: &Table, sums: bool) -> PyResult<()> {
        if self.table.is_none() {
            let (len, each) = (table.len(), 8 * table.count());
            // Slices are pairs of fp64, at a multiple of 16 bytes.
            let slices = (len + each).next_multiple_of(2);
            let (made, address) = allocate(py, device, slices + cuda::slices_len(table.count()))?;
            self.table = Some(made);
            self.places =
                Places { table: address, each: address + 8 * len as u64, slices: address + 8 * slices as u64, sums: 0 };
            self.sent.clear();
        }
        if sums && self.places.sums == 0 {
            let (made, address) = allocate(py, device, (table.blocks() as usize).max(1))?;
            self.sums = Some(made);
            self.places.sums = address;
        }
        Ok(())
    }
}

impl Memory {
    /// The buffers of a capture, or those that no capture has.
    fn buffers(&mut self, capture: u64) -> &mut Buffers {
        if capture == 0 {
            return &mut self.eager;
        }
        let found = self.captured.iter().position(|(of, _)| *of == capture);
        let at = found.unwrap_or_else(|| {
            self.captured.push((capture, Buffers::default()));
            self.captured.len() - 1
        });
        &mut self.captured[at].1
    }

    /// Brings the table up to date: gradients alone where nothing else has changed, which is nearly always.
    fn update(&mut self, device: i32, slots: &mut [Slot], gradients: &[Gradient<'_>]) -> Result<(), Error> {
        let mut same_layout = self.entries.len() == slots.len();
        self.entries.resize(slots.len(), Entry::default());
        for (i, ((slot, gradient), old)) in slots.iter_mut().zip(gradients).zip(&mut self.entries).enumerate() {
            let grad = (gradient.address as u64, slot.grad_dtype.filter(|_| gradient.is_some()));
            if !slot.is_fresh && same_layout && old.step == slot.step_at as u64 {
                if old.grad != grad {
                    old.grad = grad;
                    old.resident = stays(slot, grad.0, device)?;
                    self.table.set_grad(i, old);
                }
                continue;
            }
            slot.is_fresh = false;
            let new = Entry { resident: stays(slot, grad.0, device)?, ..entry(slot, grad, i) };
            same_layout &= Entry { grad, resident: new.resident, ..*old } == new;
            *old = new;
            if same_layout {
                self.table.set_grad(i, old);
            }
        }
        if !same_layout {
            let table = Table::new(&self.entries);
            if self.table.blocks() != table.blocks() {
                // Sums have a place for each block.
                self.eager.places.sums = 0;
            }
            self.table = table;
        }
        Ok(())
    }

    /// Sends what has changed of the table.
    fn send(&mut self, py: Python<'_>, stream: &Stream, capture: u64, sums: bool) -> PyResult<Places> {
        let table = std::mem::take(&mut self.table);
        let buffers = self.buffers(capture);
        let sent = buffers.reserve(py, stream.device, &table, sums).and_then(|()| {
            if buffers.sent == table.words() {
                return Ok(());
            }
            // SAFETY: `reserve` made room for the table; torch keeps the memory while the plan holds the tensor.
            unsafe { table.send(stream, buffers.places.table, &buffers.sent) }.map_err(raise)?;
            buffers.sent.clear();
            buffers.sent.extend_from_slice(table.words());
            Ok(())
        });
        let places = buffers.places;
        self.table = table;
        sent.map(|()| places)
    }
}

/// A slot as the table has it, with its gradient and the gradient's type.
fn entry(slot: &Slot, grad: (u64, Option<Dtype>), index: usize) -> Entry {
    let places = &slot.places;
    Entry {
        p: (places.p as u64, places.dtype),
        grad,
        n: places.n,
        eight: places.eight,
        states: places.states.map(|at| at as u64),
        absmax: places.absmax.map(|at| at as u64),
        master: places.master as u64,
        compensation: places.compensation as u64,
        step: slot.step_at as u64,
        update_squares: places.unorm as u64,
        index: index as u32,
        resident: false,
        resident_states: places.resident_states,
    }
}

/// Whether a large parameter is in memory that stays on the device, and its gradient too.
fn stays(slot: &Slot, grad: u64, device: i32) -> Result<bool, Error> {
    Ok(slot.places.resident && (grad == 0 || is_resident(device, grad)?))
}

/// The stream of the plan's device.
fn stream_of(py: Python<'_>, device: i32, slots: &[Slot]) -> PyResult<Stream> {
    Ok(Stream { device, handle: tensor("params", slots[0].param.bind(py))?.stream()? })
}

pub(super) fn step(
    py: Python<'_>,
    device: i32,
    rule: Rule,
    capturable: bool,
    slots: &mut [Slot],
    memory: &mut Memory,
    gradients: &[Gradient<'_>],
    options: &Options,
) -> PyResult<usize> {
    let place = Place::Cuda(device);
    let stream = stream_of(py, device, slots)?;
    let capture = capture_of(&stream).map_err(raise)?;
    let count = gradients.iter().filter(|gradient| gradient.is_some()).count();
    if options.lr.is_some() && !capturable {
        let (expected, got) = ("a number, or a plan made with capturable=True".into(), "a tensor".into());
        return Err(raise(Error::Value { argument: "lr", expected, got }));
    }
    let lr = pointer(options.lr.as_ref(), place)?;
    let factors = Factors {
        grad_scale: pointer(options.grad_scale.as_ref(), place)?,
        found_inf: pointer(options.found_inf.as_ref(), place)?,
        total_norm: pointer(options.total_norm.as_ref(), place)?,
        max_norm: options.max_norm,
    };
    for (slot, gradient) in slots.iter_mut().zip(gradients) {
        if !gradient.is_some() {
            continue;
        }
        if capturable {
            slot.count_on_device(py, place, capture != 0)?;
        } else {
            slot.read_steps(py)?;
        }
    }
    if count == 0 {
        return Ok(0);
    }
    memory.update(device, slots, gradients).map_err(raise)?;
    let places = memory.send(py, &stream, capture, rule.has_trust())?;
    let table = &memory.table;
    let numbers = if capturable {
        // SAFETY: the table is sent, and tensors of step counts are in it; torch keeps memory for as long as its stream needs it.
        unsafe { cuda::prepare(&stream, rule, table, &places, &options.hyper, lr, factors.found_inf) }
            .map_err(raise)?;
        Numbers::Each
    } else {
        host_numbers(rule, slots, gradients, options, &stream, &places)?
    };
    let paged: usize = slots.iter().map(|slot| slot.places.paged).sum();
    // Limited updates need sums over all blocks, and prefetching cannot be captured: there pages come when they are touched.
    let ahead = paged > 0 && capture == 0 && !rule.has_trust() && memory.left.is_short(device).map_err(raise)?;
    let parts = if ahead { parts_of(slots) } else { vec![(0..slots.len(), (0, table.blocks()))] };
    for (members, blocks) in parts {
        if ahead {
            prefetch_states(&stream, &slots[members]).map_err(raise)?;
        }
        // SAFETY: as above; everything was checked when it was read.
        unsafe { cuda::step(&stream, rule, table, &places, &numbers, &options.common, &factors, Some(blocks)) }
            .map_err(raise)?;
    }
    if !capturable {
        count_steps(py, slots, gradients)?;
    }
    Ok(count)
}

/// Neighbouring slots whose paged states together have some hundred megabytes, and their blocks.
fn parts_of(slots: &[Slot]) -> Vec<(Range<usize>, (u64, u64))> {
    const PART: usize = 256 << 20;
    let (mut parts, mut from, mut bytes, mut first, mut block) = (Vec::new(), 0, 0, 0, 0);
    for (i, slot) in slots.iter().enumerate() {
        bytes += slot.places.paged;
        block += slot.places.n.div_ceil(BLOCK) as u64;
        if bytes >= PART || i + 1 == slots.len() {
            parts.push((from..i + 1, (first, block)));
            (from, bytes, first) = (i + 1, 0, block);
        }
    }
    parts
}

/// Asks for the paged states of slots on the device before the step that comes next on the stream. The copies go at the speed of the
/// bus, ten times that of pages that come one by one.
fn prefetch_states(stream: &Stream, slots: &[Slot]) -> Result<(), Error> {
    for places in slots.iter().map(|slot| &slot.places).filter(|places| places.paged > 0) {
        let bytes = places.n * if places.eight { 1 } else { 4 };
        for address in places.states.into_iter().filter(|address| *address != 0) {
            // SAFETY: whoever made the state says that it is managed memory; if it is not, the driver returns an error.
            unsafe { prefetch(stream, address as u64, bytes, false) }?;
        }
    }
    Ok(())
}

fn pointer(tensor: Option<&TensorRef>, place: Place) -> PyResult<u64> {
    let Some(tensor) = tensor else { return Ok(0) };
    tensor.expect_place(place).map_err(raise)?;
    Ok(tensor.address() as u64)
}

/// The numbers of a step where the host counts: the same for all, or sent for each.
fn host_numbers(
    rule: Rule,
    slots: &[Slot],
    gradients: &[Gradient<'_>],
    options: &Options,
    stream: &Stream,
    places: &Places,
) -> PyResult<Numbers> {
    let mut used = slots.iter().zip(gradients).filter(|(_, gradient)| gradient.is_some()).map(|(slot, _)| slot);
    let first = used.next().map_or(0, |slot| slot.steps);
    if used.all(|slot| slot.steps == first) {
        return Ok(Numbers::Same(options.hyper.scalars(rule, first + 1)));
    }
    let all: Vec<Scalars> = slots.iter().map(|slot| options.hyper.scalars(rule, slot.steps + 1)).collect();
    // SAFETY: there is room for as many numbers as there are slots.
    unsafe { cuda::send_numbers(stream, places, &all) }.map_err(raise)?;
    Ok(Numbers::Each)
}

impl Slot {
    /// Makes the dict's `step` a tensor on the device, if it is a number, and finds where it is.
    fn count_on_device(&mut self, py: Python<'_>, place: Place, capturing: bool) -> PyResult<()> {
        if self.is_counted() {
            return Ok(());
        }
        let state = self.state.bind(py);
        let key = intern!(py, "step");
        let Some(step) = state.get_item(key)? else {
            let (expected, got) = ("a count of steps".into(), "nothing".into());
            return Err(raise(Error::Value { argument: "step", expected, got }));
        };
        let step = if step.is_instance_of::<PyInt>() {
            if capturing {
                let (expected, got) = ("a step before the capture".into(), "the first step inside of it".into());
                return Err(raise(Error::Value { argument: "step", expected, got }));
            }
            let torch = py.import(intern!(py, "torch"))?;
            let keywords = PyDict::new(py);
            keywords.set_item(intern!(py, "dtype"), torch.getattr(intern!(py, "float32"))?)?;
            keywords.set_item(intern!(py, "device"), self.param.bind(py).getattr(intern!(py, "device"))?)?;
            let made = torch.getattr(intern!(py, "full"))?.call(((), step), Some(&keywords))?;
            state.set_item(key, &made)?;
            made
        } else {
            step
        };
        let found = tensor("step", &step)?;
        found.expect_place(place).map_err(raise)?;
        found.expect_dtype(Dtype::F32).map_err(raise)?;
        crate::expect_len(&found, 1).map_err(raise)?;
        self.step_at = found.address();
        self.count_from(Some(step.unbind()));
        Ok(())
    }
}

/// A plan's part of a total of squares.
pub(super) fn add_squares(
    py: Python<'_>,
    device: i32,
    slots: &mut [Slot],
    memory: &mut Memory,
    gradients: &[Gradient<'_>],
    (total, is_first, root): (u64, bool, u64),
) -> PyResult<()> {
    let stream = stream_of(py, device, slots)?;
    let capture = capture_of(&stream).map_err(raise)?;
    memory.update(device, slots, gradients).map_err(raise)?;
    let places = memory.send(py, &stream, capture, true)?;
    // SAFETY: the table is sent and was checked; torch keeps memory for as long as its stream needs it.
    unsafe { cuda::add_squares(&stream, &memory.table, &places, total, is_first, root) }.map_err(raise)
}
