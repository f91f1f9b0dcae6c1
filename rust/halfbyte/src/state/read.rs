//! From a checkpoint. A file is untrusted: nothing is read or allocated by a size that it claims before that size has been
//! compared with the bytes that are there.

use std::collections::BTreeMap;

use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype as Stored, SafeTensors};

use super::json::{Header, NestedHeader};
use super::{NestedScales, QuantState, Scales, numel};
use crate::codebook::{Kind, Map, dynamic_map};
use crate::error::{Error, Result};
use crate::layout::{block_count, packed_len};

/// Stands between the name of the weight and that of its kind.
pub(crate) const JSON_KEY: &str = "quant_state.bitsandbytes__";

/// What stands beside a weight, below its name.
pub(crate) const SIDECARS: [&str; 4] = ["absmax", "quant_map", "nested_absmax", "nested_quant_map"];

/// Names of the 4-bit weights of a file, in alphabetical order: what [`QuantState::from_safetensors`] takes as `prefix`.
pub fn quantized_weights(file: &SafeTensors<'_>) -> Vec<String> {
    let mut names: Vec<String> = file
        .names()
        .into_iter()
        .filter_map(|name| name.rsplit_once(JSON_KEY)?.0.strip_suffix('.').map(str::to_owned))
        .collect();
    names.sort_unstable();
    names.dedup();
    names
}

impl QuantState {
    /// Reads the 4-bit weight named `prefix`, such as `model.layers.0.self_attn.q_proj.weight`, with what stands beside it.
    ///
    /// What is accepted decodes: every size is checked against the others and against the bytes. `quant_map` may have any float
    /// dtype (a process whose default dtype was bf16 writes it so) and only has to be recognizable: the values are those of
    /// the kind. `nested_quant_map` is taken as it stands if it is F32, and otherwise has to be recognizable as the signed dynamic map.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming the tensor (and the JSON key) at fault.
    pub fn from_safetensors(file: &SafeTensors<'_>, prefix: &str) -> Result<Self> {
        let part = |name: &str| name.strip_prefix(prefix).and_then(part_of).map(str::to_owned);
        Self::from_parts(prefix, file.iter().filter_map(|(name, view)| Some((part(name)?, view))))
    }

    /// As [`QuantState::from_safetensors`], from the tensors themselves: each with what its name has after that of the weight
    /// and a dot, that of the packed bytes with nothing.
    pub(crate) fn from_parts<'a>(
        prefix: &str,
        parts: impl IntoIterator<Item = (String, TensorView<'a>)>,
    ) -> Result<Self> {
        let source = Source { parts: parts.into_iter().collect(), prefix };
        let (header, header_key) = source.header()?;
        let n = numel(&header.shape).expect("the header was checked");
        let blocks = block_count(n, header.block);

        let scales = match header.nested {
            None => {
                for name in ["nested_absmax", "nested_quant_map"] {
                    if source.get(name).is_some() {
                        let got = format!("{header_key} without nested_blocksize");
                        return Err(Error::checkpoint(source.key(name), "no such tensor, or nested statistics", got));
                    }
                }
                Scales::Plain(source.fp32("absmax", blocks)?)
            }
            Some(nested) => Scales::Nested(source.nested(nested, blocks)?),
        };
        source.check_quant_map(header.kind)?;
        let (packed, storage) = source.packed(n)?;
        let Header { kind, block, dtype, shape, .. } = header;
        Ok(Self { kind, block, dtype, shape, scales, packed, storage })
    }
}

/// What a name has after that of its weight: nothing, or what comes after a dot.
fn part_of(rest: &str) -> Option<&str> {
    if rest.is_empty() { Some(rest) } else { rest.strip_prefix('.') }
}

/// The tensors of one weight.
struct Source<'a, 'p> {
    parts: BTreeMap<String, TensorView<'a>>,
    prefix: &'p str,
}

impl<'a> Source<'a, '_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.prefix)
    }

    fn get(&self, name: &str) -> Option<&TensorView<'a>> {
        self.parts.get(name)
    }

    /// A tensor of rank 1 with `len` elements of one of `dtypes`.
    fn vector(&self, name: &str, dtypes: &[Stored], len: usize) -> Result<&TensorView<'a>> {
        let expected = || {
            let dtypes: Vec<String> = dtypes.iter().map(|d| format!("{d:?}")).collect();
            format!("{} [{len}]", dtypes.join(" or "))
        };
        let tensor = self.get(name).ok_or_else(|| Error::checkpoint(self.key(name), expected(), "no such tensor"))?;
        if !dtypes.contains(&tensor.dtype()) || tensor.shape() != [len] {
            return Err(Error::checkpoint(self.key(name), expected(), describe(tensor)));
        }
        Ok(tensor)
    }

    fn fp32(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        Ok(floats(self.vector(name, &[Stored::F32], len)?))
    }

    /// Finds the JSON object, which carries its kind in its key, and sees to it that nothing unknown stands beside the weight.
    fn header(&self) -> Result<(Header, String)> {
        let mut found: Option<(&str, Kind)> = None;
        for name in self.parts.keys().map(String::as_str) {
            if name.is_empty() || SIDECARS.contains(&name) {
                continue;
            }
            let kind = name.strip_prefix(JSON_KEY).and_then(Kind::from_name).ok_or_else(|| {
                let expected =
                    format!("{}, {JSON_KEY}nf4 or {JSON_KEY}fp4 after the weight's name", SIDECARS.join(", "));
                Error::checkpoint(self.key(name), expected, "an unknown name")
            })?;
            if let Some((other, _)) = found {
                return Err(Error::checkpoint(
                    self.key(name),
                    "one quantization state",
                    format!("{} too", self.key(other)),
                ));
            }
            found = Some((name, kind));
        }
        let Some((name, kind)) = found else {
            let key = self.key(JSON_KEY) + "nf4";
            return Err(Error::checkpoint(key, "a quantization state (or one for fp4)", "no such tensor"));
        };
        let key = self.key(name);
        let tensor = self.get(name).ok_or_else(|| Error::checkpoint(&key, "U8 [_]", "no such tensor"))?;
        if tensor.dtype() != Stored::U8 || tensor.shape().len() != 1 {
            return Err(Error::checkpoint(key, "U8 [_]", describe(tensor)));
        }
        let header = Header::parse(tensor.data(), &key)?;
        if header.kind != kind {
            return Err(Error::checkpoint(key, format!("`quant_type` to be {}", kind.name()), header.kind.name()));
        }
        Ok((header, key))
    }

    fn nested(&self, header: NestedHeader, blocks: usize) -> Result<NestedScales> {
        let NestedHeader { block, offset } = header;
        let codes = self.vector("absmax", &[Stored::U8], blocks)?.data().to_vec();
        let absmax = self.fp32("nested_absmax", block_count(blocks, block))?;
        let map = self.nested_map()?;
        Ok(NestedScales { codes, absmax, map, offset, block })
    }

    fn nested_map(&self) -> Result<Box<Map>> {
        let name = "nested_quant_map";
        let tensor = self.vector(name, FLOATS, 256)?;
        let map: Box<Map> = floats(tensor).try_into().expect("the length was checked");
        if tensor.dtype() == Stored::F32 {
            if let Some(bad) = map.iter().find(|value| !value.is_finite()) {
                return Err(Error::checkpoint(self.key(name), "finite values", bad));
            }
            return Ok(map);
        }
        let dynamic = dynamic_map(true);
        if !alike(&map[..], dynamic) {
            return Err(Error::checkpoint(
                self.key(name),
                "the signed dynamic map, or F32",
                format!("other {:?}", tensor.dtype()),
            ));
        }
        Ok(Box::new(*dynamic))
    }

    fn check_quant_map(&self, kind: Kind) -> Result<()> {
        let name = "quant_map";
        if alike(&floats(self.vector(name, FLOATS, 16)?), kind.values()) {
            return Ok(());
        }
        Err(Error::checkpoint(self.key(name), format!("the values of {}", kind.name()), "other values"))
    }

    /// The packed bytes of `n` weights, whatever dtype and shape they are stored under. A dtype wider than a byte may have made
    /// padding necessary, of less than one element.
    fn packed(&self, n: usize) -> Result<(Vec<u8>, Stored)> {
        let expected = || format!("a tensor of {} bytes", packed_len(n));
        let tensor = self.get("").ok_or_else(|| Error::checkpoint(self.prefix, expected(), "no such tensor"))?;
        let bits = tensor.dtype().bitsize();
        if bits % 8 != 0 || tensor.data().len() != packed_len(n).next_multiple_of(bits / 8) {
            return Err(Error::checkpoint(self.prefix, expected(), describe(tensor)));
        }
        Ok((tensor.data()[..packed_len(n)].to_vec(), tensor.dtype()))
    }
}

const FLOATS: &[Stored] = &[Stored::F32, Stored::F16, Stored::BF16, Stored::F64];

fn describe(tensor: &TensorView<'_>) -> String {
    let shape = tensor.shape();
    if shape.len() > 8 {
        return format!("{:?} of rank {}", tensor.dtype(), shape.len());
    }
    format!("{:?} {shape:?}", tensor.dtype())
}

/// The elements of a tensor of one of [`FLOATS`], as fp32.
fn floats(tensor: &TensorView<'_>) -> Vec<f32> {
    fn convert<const N: usize>(data: &[u8], to_f32: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        data.as_chunks().0.iter().map(|&bytes| to_f32(bytes)).collect()
    }
    let data = tensor.data();
    match tensor.dtype() {
        Stored::F32 => convert(data, f32::from_le_bytes),
        Stored::F16 => convert(data, |bytes| f16::from_le_bytes(bytes).to_f32()),
        Stored::BF16 => convert(data, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        Stored::F64 => convert(data, |bytes| f64::from_le_bytes(bytes) as f32),
        other => unreachable!("{other:?} was not let in"),
    }
}

/// Whether a table is the known one, up to a rounding to fp16 or bf16.
fn alike(table: &[f32], known: &[f32]) -> bool {
    table.iter().zip(known).all(|(a, b)| (a - b).abs() <= b.abs() / 256.0 + f32::EPSILON)
}
