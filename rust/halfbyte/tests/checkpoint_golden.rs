//! Files that bitsandbytes 0.50.2 wrote (`tests/golden`, whose generator describes them): the same bytes come out here, and
//! its checkpoints read, decode and write as they are.

use std::path::Path;

use half::{bf16, f16};
use halfbyte::codebook::{Map, dynamic_map};
use halfbyte::eight_bit::{self, Rounding};
use halfbyte::layout::{NESTED_BLOCK, block_count, packed_len};
use halfbyte::state::{NestedScales, Scales, quantized_weights};
use halfbyte::{Dtype, Element, Kind, QuantState, four_bit};
use safetensors::{SafeTensors, View};

fn read(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Takes the tensors of a file apart again: each call gives the next `n` elements of a tensor.
struct Parts<'a> {
    file: SafeTensors<'a>,
    lines: Vec<(String, Vec<String>)>,
    taken: std::collections::HashMap<String, usize>,
}

impl<'a> Parts<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        let (_, metadata) = SafeTensors::read_metadata(bytes).unwrap();
        let lines = metadata.metadata().as_ref().unwrap().iter();
        let lines = lines.map(|(key, text)| (key.clone(), text.lines().map(str::to_owned).collect())).collect();
        Self { file: SafeTensors::deserialize(bytes).unwrap(), lines, taken: std::collections::HashMap::new() }
    }

    fn lines(&self, key: &str) -> Vec<String> {
        self.lines.iter().find(|(k, _)| k == key).unwrap().1.clone()
    }

    fn bytes(&mut self, name: &str, n: usize) -> &'a [u8] {
        let at = self.taken.entry(name.to_owned()).or_default();
        let data = self.file.tensor(name).unwrap().data();
        *at += n;
        &data[*at - n..*at]
    }

    fn floats(&mut self, name: &str, n: usize) -> Vec<f32> {
        self.bytes(name, n * 4).as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
    }

    fn digest(&mut self, name: &str) -> u64 {
        u64::from_le_bytes(self.bytes(name, 8).try_into().unwrap())
    }

    fn finish(self) {
        for (name, taken) in &self.taken {
            assert_eq!(self.file.tensor(name).unwrap().data().len(), *taken, "{name} has more");
        }
    }
}

fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// `make_input` of the generator.
fn make_input(seed: u64, n: usize, special: bool) -> Vec<f32> {
    let mut values: Vec<f32> = (0..n as u64)
        .map(|i| {
            let bits = mix((seed << 32) + i);
            let lanes: i64 = (0..4).map(|lane| (bits >> (16 * lane) & 0xffff) as i64).sum();
            ((lanes - 131_070) * (1 + (i as i64 / 29) % 7)) as f32 / (1 << 19) as f32
        })
        .collect();
    if special {
        values[64..128].fill(0.0);
        values[130] = f32::INFINITY;
        values[200] = f32::NAN;
        values[256..320].iter_mut().for_each(|v| *v *= 1e-39);
        values[320..384].iter_mut().for_each(|v| *v = if *v < 0.0 { -0.75 } else { 0.75 });
        values[384..448].fill(0.0);
        values[400] = -2.0;
    }
    values
}

/// `digest` of the generator: over bit patterns, with one for every NaN and one for both zeros.
fn digest<T: Element>(values: &[T], bits: impl Fn(T) -> u64) -> u64 {
    let bits = |value: T| bits(T::from_f32(if value.to_f32().is_nan() { f32::NAN } else { value.to_f32() + 0.0 }));
    values
        .iter()
        .enumerate()
        .fold(0, |sum: u64, (i, &value)| sum.wrapping_add((bits(value) + 1).wrapping_mul(mix(i as u64) | 1)))
}

/// The digest of a weight dequantized to the dtype that it came from.
fn dequantized_digest(state: &QuantState) -> u64 {
    match state.dtype {
        Dtype::F32 => digest(&state.dequantize::<f32>().unwrap(), |v| u64::from(v.to_bits())),
        Dtype::F16 => digest(&state.dequantize::<f16>().unwrap(), |v| u64::from(v.to_bits())),
        Dtype::Bf16 => digest(&state.dequantize::<bf16>().unwrap(), |v| u64::from(v.to_bits())),
    }
}

fn same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan())
}

fn quantize<T: Element>(values: &[f32], kind: Kind, block: usize) -> (Vec<u8>, Vec<f32>) {
    let weights: Vec<T> = values.iter().map(|&v| T::from_f32(v)).collect();
    let (mut packed, mut absmax) = (vec![0; packed_len(values.len())], vec![0.0; block_count(values.len(), block)]);
    four_bit::quantize_into(&weights, kind, block, &mut packed, &mut absmax).unwrap();
    (packed, absmax)
}

fn json(state: &QuantState) -> String {
    let tensors = state.to_tensors("w").unwrap();
    let (name, blob) = tensors.last().unwrap();
    assert_eq!(*name, format!("w.quant_state.bitsandbytes__{}", state.kind.name()));
    String::from_utf8(blob.data().into_owned()).unwrap()
}

#[test]
fn four_bit_bytes_are_equal() {
    let bytes = read("four_bit.safetensors");
    let mut parts = Parts::new(&bytes);
    let (plain_json, nested_json) = (parts.lines("json"), parts.lines("nested_json"));
    for (i, line) in parts.lines("cases").iter().enumerate() {
        let [kind, block, dtype, shape, seed, special] = line.split(' ').collect::<Vec<_>>().try_into().unwrap();
        let (kind, dtype) = (Kind::from_name(kind).unwrap(), Dtype::from_name(dtype).unwrap());
        let block: usize = block.parse().unwrap();
        let shape: Vec<usize> = shape.split('x').map(|d| d.parse().unwrap()).collect();
        let n: usize = shape.iter().product();
        let blocks = block_count(n, block);

        let values = make_input(seed.parse().unwrap(), n, special == "1");
        let (packed, absmax) = match dtype {
            Dtype::F32 => quantize::<f32>(&values, kind, block),
            Dtype::F16 => quantize::<f16>(&values, kind, block),
            Dtype::Bf16 => quantize::<bf16>(&values, kind, block),
        };
        assert!(packed == parts.bytes("packed", packed_len(n)), "packed: {line}");
        assert!(same(&absmax, &parts.floats("absmax", blocks)), "absmax: {line}");

        let storage = safetensors::Dtype::U8;
        let mut state =
            QuantState { kind, block, dtype, shape, scales: Scales::Plain(absmax.clone()), packed, storage };
        assert_eq!(json(&state), plain_json[i]);
        assert_eq!(dequantized_digest(&state), parts.digest("digest"), "dequantized: {line}");

        // The offset is the file's: torch's fp32 mean, whose last bit depends on the machine.
        let offset = parts.floats("nested_offset", 1)[0];
        let (map, mut codes, mut nested) =
            (dynamic_map(true), vec![0; blocks], vec![0.0; block_count(blocks, NESTED_BLOCK)]);
        eight_bit::quantize_into(&absmax, map, NESTED_BLOCK, offset, Rounding::Grid, &mut codes, &mut nested).unwrap();
        assert!(codes == parts.bytes("nested_codes", blocks), "nested codes: {line}");
        assert!(same(&nested, &parts.floats("nested_absmax", nested.len())), "nested absmax: {line}");
        let map = Box::new(*map);
        state.scales = Scales::Nested(NestedScales { codes, absmax: nested, map, offset, block: NESTED_BLOCK });
        assert_eq!(json(&state), nested_json[i]);
        assert_eq!(dequantized_digest(&state), parts.digest("nested_digest"), "dequantized, nested: {line}");
    }
    parts.finish();
}

fn quantize_blockwise<T: Element>(values: &[f32], map: &Map, block: usize) -> (Vec<u8>, Vec<f32>, u64) {
    let values: Vec<T> = values.iter().map(|&v| T::from_f32(v)).collect();
    let (mut codes, mut absmax) = (vec![0; values.len()], vec![0.0; block_count(values.len(), block)]);
    eight_bit::quantize_into(&values, map, block, 0.0, Rounding::Grid, &mut codes, &mut absmax).unwrap();
    let mut again = vec![T::default(); values.len()];
    eight_bit::dequantize_into(&codes, map, &absmax, block, 0.0, &mut again).unwrap();
    // Widening is exact: bits of the type itself, from those of fp32.
    let digest = match T::DTYPE {
        Dtype::F32 => digest(&again, |v| u64::from(v.to_f32().to_bits())),
        Dtype::F16 => digest(&again, |v| u64::from(f16::from_f32(v.to_f32()).to_bits())),
        Dtype::Bf16 => digest(&again, |v| u64::from(bf16::from_f32(v.to_f32()).to_bits())),
    };
    (codes, absmax, digest)
}

#[test]
fn eight_bit_bytes_are_equal() {
    let bytes = read("eight_bit.safetensors");
    let mut parts = Parts::new(&bytes);
    for (signed, name) in [(true, "signed_map"), (false, "unsigned_map")] {
        assert!(same(dynamic_map(signed), &parts.floats(name, 256)), "{name}");
    }
    for line in parts.lines("cases") {
        let [map, block, dtype, n, seed] = line.split(' ').collect::<Vec<_>>().try_into().unwrap();
        let (block, n): (usize, usize) = (block.parse().unwrap(), n.parse().unwrap());
        let signed = map == "signed";
        let mut values = make_input(seed.parse().unwrap(), n, false);
        if !signed {
            for v in &mut values {
                *v = v.abs();
            }
        }
        let map = dynamic_map(signed);
        let (codes, absmax, digest) = match Dtype::from_name(dtype).unwrap() {
            Dtype::F32 => quantize_blockwise::<f32>(&values, map, block),
            Dtype::F16 => quantize_blockwise::<f16>(&values, map, block),
            Dtype::Bf16 => quantize_blockwise::<bf16>(&values, map, block),
        };
        assert!(codes == parts.bytes("codes", n), "codes: {line}");
        assert!(same(&absmax, &parts.floats("absmax", block_count(n, block))), "absmax: {line}");
        assert_eq!(digest, parts.digest("digest"), "dequantized: {line}");
    }
    parts.finish();
}

#[test]
fn checkpoints_read_decode_and_write_as_they_are() {
    let (bytes, expected) = (read("checkpoints.safetensors"), read("checkpoints_dequantized.safetensors"));
    let (file, expected) = (SafeTensors::deserialize(&bytes).unwrap(), SafeTensors::deserialize(&expected).unwrap());
    let weights = quantized_weights(&file);
    assert_eq!(weights.len(), expected.len());
    for weight in weights {
        let state = QuantState::from_safetensors(&file, &weight).unwrap();
        let layer = weight.strip_suffix(".weight").unwrap();
        assert_eq!(state.shape, [12, 88]);
        assert_eq!(matches!(state.scales, Scales::Nested(_)), layer.ends_with("nested"));

        let decoded: Vec<u8> = match state.dtype {
            Dtype::F32 => state.dequantize::<f32>().unwrap().iter().flat_map(|v| v.to_le_bytes()).collect(),
            Dtype::F16 => state.dequantize::<f16>().unwrap().iter().flat_map(|v| v.to_le_bytes()).collect(),
            Dtype::Bf16 => state.dequantize::<bf16>().unwrap().iter().flat_map(|v| v.to_le_bytes()).collect(),
        };
        let wanted = expected.tensor(layer).unwrap();
        assert_eq!(wanted.dtype().to_string(), ["F32", "F16", "BF16"][state.dtype as usize]);
        assert!(decoded == wanted.data(), "{layer}");

        for (name, tensor) in state.to_tensors(&weight).unwrap() {
            let wanted = file.tensor(&name).unwrap();
            if layer.contains("default") && name.ends_with(".quant_map") {
                // Written under another default dtype; ours is always fp32.
                assert_eq!((wanted.dtype(), tensor.dtype()), (safetensors::Dtype::BF16, safetensors::Dtype::F32));
                continue;
            }
            assert_eq!((tensor.dtype(), tensor.shape()), (wanted.dtype(), wanted.shape()), "{name}");
            assert!(tensor.data() == wanted.data(), "{name}");
        }
    }
}
