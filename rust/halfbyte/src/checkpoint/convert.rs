//! A conversion under way: items one after another, files as they fill.

use std::path::{Path, PathBuf};

use safetensors::Dtype as Stored;

use super::files::{Destination, Shard};
use super::plan::{Action, Item, Output, Plan, float, stored};
use super::source::Source;
use super::weight::{Buffer, Encoding, bytes_of, cast_bytes, decode, encode, transpose};
use super::{DequantizeOptions, Existing, QuantizeOptions, Scheme, config, file_error, path_text, weight};
use crate::element::{Dtype, Element};
use crate::error::{Error, Result};
use crate::four_bit;
use crate::layout::check_four_bit_block;
use crate::with_type;

/// Bytes of a tensor that is only copied which are in memory at a time.
const PIECE: u64 = 8 << 20;
/// What is copied along is smaller; anything else in the folder is no part of a checkpoint.
const SMALL_FILE: u64 = 100 << 20;
/// Endings of files that are weights in another format, or lists of such.
const WEIGHT_FILES: [&str; 11] =
    [".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot"];
/// A folder of templates that belongs to a tokenizer.
const TEMPLATES: &str = "additional_chat_templates";

/// A tensor that somebody else quantized: what [`Conversion::write`] takes.
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    /// What its name has after that of the weight (4 bits) or its module (int8) and a dot; nothing for the packed bytes.
    pub name: &'a str,
    /// Its element type.
    pub dtype: Stored,
    /// Its bytes.
    pub data: &'a [u8],
}

/// What came out of a conversion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Files with tensors.
    pub files: usize,
    /// Bytes of tensors read.
    pub bytes_read: u64,
    /// Bytes of tensors in the result.
    pub bytes_written: u64,
}

/// A conversion of a checkpoint. Made, it has read headers and written nothing; [`Conversion::run`] does all, or
/// [`Conversion::next`] and what follows it do one item at a time.
pub struct Conversion {
    source: Source,
    plan: Plan,
    folder: PathBuf,
    existing: Existing,
    journal: String,
    encoding: Option<Encoding>,
    buffer: Buffer,
    destination: Option<Destination>,
    /// The file that is being filled, and its number.
    shard: Option<(usize, Shard)>,
    /// The item to come.
    at: usize,
    /// Whether `next` has given it out.
    ready: bool,
    written: Vec<u64>,
}

impl Conversion {
    /// Plans to quantize the checkpoint `source` (a file or a folder) to the folder `destination`.
    ///
    /// # Errors
    /// [`Error::Value`] for options that do not exist, [`Error::File`] if a file cannot be read or the destination is the source, and
    /// [`Error::Checkpoint`] if the source is damaged or quantized already.
    pub fn quantize(source: &Path, destination: &Path, options: &QuantizeOptions<'_>) -> Result<Self> {
        if let Scheme::FourBit(spec) = options.scheme {
            check_four_bit_block(spec.block)?;
        }
        if super::storage_name(options.storage).is_none() {
            let got = options.storage.to_string();
            return Err(Error::value("storage", "U8, I8, F16, BF16 or F32", got));
        }
        let opened = open(source, destination)?;
        let plan = Plan::quantize(&opened, options)?;
        let about = format!(
            "quantize {:?}\nsearch {}\nstorage {}\ndtype {:?}\nshard {}\ndevice {}",
            options.scheme, options.scale_search, options.storage, options.dtype, options.shard_size, options.device
        );
        Self::new(opened, plan, destination, options.existing, &about, Some(Encoding::new(options)))
    }

    /// Plans to decode the checkpoint `source` (a file or a folder) to the folder `destination`.
    ///
    /// # Errors
    /// Those of [`Conversion::quantize`]; [`Error::Checkpoint`] if nothing in the source is quantized.
    pub fn dequantize(source: &Path, destination: &Path, options: &DequantizeOptions) -> Result<Self> {
        let opened = open(source, destination)?;
        let plan = Plan::dequantize(&opened, options)?;
        let about = format!("dequantize\ndtype {:?}\nshard {}", options.dtype, options.shard_size);
        Self::new(opened, plan, destination, options.existing, &about, None)
    }

    fn new(
        source: Source,
        plan: Plan,
        folder: &Path,
        existing: Existing,
        about: &str,
        encoding: Option<Encoding>,
    ) -> Result<Self> {
        // One line a file and one a kept tensor: whatever changes the bytes of the result changes this.
        let mut lines = vec![format!("halfbyte {} {about}", env!("CARGO_PKG_VERSION"))];
        lines.extend(source.identity()?);
        lines.extend(plan.items.iter().map(|item| format!("{:?} {}", item.action, item.name.escape_debug())));
        lines.push(plan.config.clone().unwrap_or_default());
        let written = vec![0; plan.shards.len()];
        Ok(Self {
            source,
            plan,
            folder: folder.to_owned(),
            existing,
            journal: lines.join("\n") + "\n",
            encoding,
            buffer: Buffer::default(),
            destination: None,
            shard: None,
            at: 0,
            ready: false,
            written,
        })
    }

    /// What is done to each tensor, in the order in which it is done.
    pub fn items(&self) -> &[Item] {
        &self.plan.items
    }

    /// Does everything that is left. `report` is called before each item, and at the end, with the number of items done.
    ///
    /// # Errors
    /// [`Error::File`] if a file cannot be read or written, [`Error::Checkpoint`] if one changed or a weight is damaged. What is
    /// finished stays, and can be resumed.
    pub fn run(&mut self, mut report: impl FnMut(usize, &[Item])) -> Result<Summary> {
        while let Some(i) = self.next()? {
            report(i, &self.plan.items);
            self.convert(&four_bit::mean)?;
        }
        report(self.plan.items.len(), &self.plan.items);
        self.finish()
    }

    /// The number of the item to be converted now, `None` after the last one. Files that an interrupted conversion finished are
    /// passed over.
    ///
    /// # Errors
    /// Those of [`Conversion::run`].
    #[expect(clippy::should_implement_trait, reason = "it fails")]
    pub fn next(&mut self) -> Result<Option<usize>> {
        if self.destination.is_none() {
            self.destination = Some(Destination::open(&self.folder, self.existing, &self.journal)?);
        }
        if self.ready {
            return Ok(Some(self.at));
        }
        loop {
            if let Some((number, _)) = &self.shard {
                if self.at < self.plan.shards[*number].end {
                    break;
                }
                self.close_shard()?;
            }
            let Some(number) = self.plan.shards.iter().position(|range| range.contains(&self.at)) else {
                return Ok(None);
            };
            let destination = self.destination.as_ref().expect("opened above");
            let outputs = self.outputs(number);
            if let Some(bytes) = destination.finished(&self.file_name(number), &outputs)? {
                self.written[number] = bytes;
                self.at = self.plan.shards[number].end;
                continue;
            }
            self.shard = Some((number, destination.shard(&outputs)?));
        }
        self.ready = true;
        Ok(Some(self.at))
    }

    fn outputs(&self, shard: usize) -> Vec<&Output> {
        self.plan.items[self.plan.shards[shard].clone()].iter().flat_map(|item| &item.outputs).collect()
    }

    fn file_name(&self, number: usize) -> String {
        let (stem, count) = (self.source.stem(), self.plan.shards.len());
        if count == 1 {
            return format!("{stem}.safetensors");
        }
        format!("{stem}-{:05}-of-{count:05}.safetensors", number + 1)
    }

    fn close_shard(&mut self) -> Result<()> {
        let Some((number, shard)) = self.shard.take() else { return Ok(()) };
        let (partial, bytes) = shard.close()?;
        self.written[number] = bytes;
        self.destination.as_ref().expect("a shard is in it").finish(partial, &self.file_name(number))
    }

    /// The item that [`Conversion::next`] gave out.
    fn current(&self) -> Result<&Item> {
        if self.ready {
            return Ok(&self.plan.items[self.at]);
        }
        Err(Error::value("conversion", "an item that `next` gave out", "none"))
    }

    /// Reads the weight of an item that is to be quantized: in the dtype and the shape that the item has for it.
    ///
    /// # Errors
    /// [`Error::Value`] if the item is not to be quantized, [`Error::Shape`] if `out` has another size, and those of
    /// [`Conversion::run`].
    pub fn read(&mut self, out: &mut [u8]) -> Result<()> {
        let item = self.current()?;
        let Action::Quantize { dtype, .. } = item.action else {
            return Err(Error::value("item", "a weight to be quantized", &item.name));
        };
        let bytes = item.shape.iter().product::<usize>() * dtype.size();
        if out.len() != bytes {
            return Err(Error::shape("out", format!("[{bytes}] bytes"), format!("[{}]", out.len())));
        }
        if item.sources[0].dtype == stored(dtype) && !matches!(item.action, Action::Quantize { transposed: true, .. }) {
            return self.source.read(&item.sources[0], 0, out);
        }
        with_type!(dtype, T => out.copy_from_slice(bytes_of::<T>(&self.weights()?)));
        Ok(())
    }

    /// The weight of the item, cast and turned as it is to be quantized.
    fn weights<T: Element>(&mut self) -> Result<Vec<T>> {
        let item = &self.plan.items[self.at];
        let tensor = &item.sources[0];
        self.source.read(tensor, 0, self.buffer.bytes_mut(tensor.bytes as usize))?;
        let from = float(tensor.dtype).expect("only floats are quantized");
        let cast = with_type!(from, A => weight::cast::<A, T>(self.buffer.elements()));
        if matches!(item.action, Action::Quantize { transposed: true, .. }) {
            return Ok(transpose(&cast, tensor.shape[0], tensor.shape[1]));
        }
        Ok(cast)
    }

    /// Writes what somebody else made of the item: each of its tensors, in any order.
    ///
    /// # Errors
    /// [`Error::Value`], [`Error::Dtype`] or [`Error::Shape`] if they are not the tensors that the item has; nothing is written then.
    pub fn write(&mut self, parts: &[Part<'_>]) -> Result<()> {
        let item = self.current()?;
        let module = item.name.strip_suffix(".weight").unwrap_or(&item.name);
        let is = |output: &Output, part: &str| match part {
            "" => output.name == item.name,
            part => [&item.name, module].iter().any(|stem| output.name == format!("{stem}.{part}")),
        };
        let mut data = Vec::with_capacity(item.outputs.len());
        for output in &item.outputs {
            let found = parts.iter().find(|part| is(output, part.name));
            let part = found.ok_or_else(|| Error::value("parts", format!("`{}` among them", output.name), "none"))?;
            if part.dtype != output.dtype {
                let (expected, got) = (output.dtype.to_string(), part.dtype.to_string());
                return Err(Error::Dtype { argument: "parts", expected, got });
            }
            let (bytes, got) = (output.bytes(), part.data.len() as u64);
            if got > bytes || (got < bytes && !output.text) {
                return Err(Error::shape("parts", format!("[{bytes}] bytes of `{}`", output.name), format!("[{got}]")));
            }
            data.push(part.data);
        }
        if parts.len() != data.len() {
            return Err(Error::value("parts", format!("{} tensors", data.len()), parts.len()));
        }
        self.put(&data)
    }

    fn put(&mut self, data: &[&[u8]]) -> Result<()> {
        let first = self.first_output();
        let (_, shard) = self.shard.as_mut().expect("an item is out");
        for (i, bytes) in data.iter().enumerate() {
            shard.append(first + i, bytes)?;
        }
        self.done();
        Ok(())
    }

    /// The number of the item's first tensor in its file.
    fn first_output(&self) -> usize {
        let (number, _) = self.shard.as_ref().expect("an item is out");
        let before = self.plan.shards[*number].start..self.at;
        self.plan.items[before].iter().map(|item| item.outputs.len()).sum()
    }

    fn done(&mut self) {
        self.at += 1;
        self.ready = false;
    }

    /// Converts the item. `offset` is the mean of scales for double quantization, [`four_bit::mean`] or one that is summed as
    /// another library does.
    ///
    /// # Errors
    /// Those of [`Conversion::run`].
    pub fn convert(&mut self, offset: &dyn Fn(&[f32]) -> f32) -> Result<()> {
        match self.current()?.action {
            Action::Keep(_) => self.copy(None),
            Action::Cast(_, dtype) => self.copy(Some(dtype)),
            Action::Quantize { dtype, transposed } => with_type!(dtype, T => self.encode::<T>(transposed, offset)),
            Action::Dequantize { dtype, transposed, int8 } => {
                with_type!(dtype, T => self.decode::<T>(transposed, int8))
            }
        }
    }

    fn copy(&mut self, dtype: Option<Dtype>) -> Result<()> {
        let output = self.first_output();
        let item = &self.plan.items[self.at];
        let tensor = &item.sources[0];
        let (_, shard) = self.shard.as_mut().expect("an item is out");
        let mut at = 0;
        while at < tensor.bytes {
            let bytes = PIECE.min(tensor.bytes - at);
            self.source.read(tensor, at, self.buffer.bytes_mut(bytes as usize))?;
            match dtype {
                None => shard.append(output, self.buffer.bytes())?,
                Some(to) => shard.append(output, &cast_bytes(tensor.dtype, to, &self.buffer))?,
            }
            at += bytes;
        }
        self.done();
        Ok(())
    }

    fn encode<T: Element>(&mut self, transposed: bool, offset: &dyn Fn(&[f32]) -> f32) -> Result<()> {
        let encoding = self.encoding.expect("items are quantized by conversions that quantize");
        let first = self.first_output();
        let tensor = &self.plan.items[self.at].sources[0];
        let as_stored = tensor.dtype == stored(T::DTYPE) && !transposed;
        let turned = if as_stored {
            self.source.read(tensor, 0, self.buffer.bytes_mut(tensor.bytes as usize))?;
            Vec::new()
        } else {
            self.weights::<T>()?
        };
        let weights = if as_stored { self.buffer.elements::<T>() } else { &turned };
        let (_, shard) = self.shard.as_mut().expect("an item is out");
        let put = |i: usize, bytes: &[u8]| shard.append(first + i, bytes);
        encode(weights, &self.plan.items[self.at].shape, &encoding, offset, put)?;
        self.done();
        Ok(())
    }

    fn decode<T: Element>(&mut self, transposed: bool, int8: bool) -> Result<()> {
        let item = &self.plan.items[self.at];
        let mut weights: Vec<T> = decode(&self.source, &item.sources, &item.shape, int8)?;
        if transposed {
            weights = transpose(&weights, item.shape[0], item.shape[1]);
        }
        self.put(&[bytes_of(&weights)])
    }

    /// Writes what is not tensors: tokenizer and other small files, the index, `config.json` last.
    ///
    /// # Errors
    /// Those of [`Conversion::run`]; [`Error::Value`] if items are left.
    pub fn finish(&mut self) -> Result<Summary> {
        if self.next()?.is_some() {
            let left = self.plan.items.len() - self.at;
            return Err(Error::value("conversion", "no items left", left));
        }
        let destination = self.destination.take().expect("`next` has opened it");
        for (from, name) in self.small_files()? {
            destination.copy(&from, &name)?;
        }
        if self.plan.shards.len() > 1 {
            destination.write(&format!("{}.safetensors.index.json", self.source.stem()), self.index().as_bytes())?;
        }
        if let Some(config) = &self.plan.config {
            destination.write(config::NAME, config.as_bytes())?;
        }
        destination.close()?;
        Ok(Summary {
            files: self.plan.shards.len(),
            bytes_read: self.plan.items.iter().map(|i| i.bytes).sum(),
            bytes_written: self.written.iter().sum(),
        })
    }

    fn index(&self) -> String {
        let mut map: Vec<(String, String)> = Vec::new();
        for number in 0..self.plan.shards.len() {
            let file = self.file_name(number);
            map.extend(self.outputs(number).iter().map(|output| (output.name.clone(), file.clone())));
        }
        map.sort();
        let entry = |(name, file): &(String, String)| format!("    {}: \"{file}\"", serde_json::Value::from(&name[..]));
        let map: Vec<_> = map.iter().map(entry).collect();
        let parameters: u64 =
            self.plan.items.iter().map(|item| item.shape.iter().map(|&d| d as u64).product::<u64>()).sum();
        let size: u64 = self.written.iter().sum();
        format!(
            "{{\n  \"metadata\": {{\n    \"total_parameters\": {parameters},\n    \"total_size\": {size}\n  }},\n  \
             \"weight_map\": {{\n{}\n  }}\n}}\n",
            map.join(",\n")
        )
    }

    /// The files to copy, with their names in the result.
    fn small_files(&self) -> Result<Vec<(PathBuf, PathBuf)>> {
        let Some(folder) = self.source.folder() else { return Ok(Vec::new()) };
        let mut found = Vec::new();
        for sub in ["", TEMPLATES] {
            let folder = folder.join(sub);
            if !folder.is_dir() {
                continue;
            }
            let failed = |e: std::io::Error| file_error("read", path_text(&folder), &e);
            for entry in folder.read_dir().map_err(failed)? {
                let entry = entry.map_err(failed)?;
                let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
                let weights = WEIGHT_FILES.iter().any(|ending| name.ends_with(ending));
                if name.starts_with('.') || weights || name == config::NAME {
                    continue;
                }
                // Through links: a hub cache has nothing else.
                if path.metadata().is_ok_and(|m| m.is_file() && m.len() <= SMALL_FILE) {
                    found.push((path, Path::new(sub).join(entry.file_name())));
                }
            }
        }
        found.sort();
        Ok(found)
    }
}

/// Opens the source, when the destination is another place.
fn open(source: &Path, destination: &Path) -> Result<Source> {
    let opened = Source::open(source)?;
    let folder = if source.is_dir() { Some(source) } else { source.parent() };
    let real = |path: &Path| path.canonicalize().ok();
    let from = folder.and_then(|f| real(if f.as_os_str().is_empty() { Path::new(".") } else { f }));
    if from.is_some() && from == real(destination) {
        return Err(Error::file("write to", path_text(destination), "it is where the checkpoint is read from"));
    }
    Ok(opened)
}
