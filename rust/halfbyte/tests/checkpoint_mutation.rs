//! Damaged and lying checkpoints: whatever a file says, reading it gives a typed error or a weight that decodes.
//!
//! Each case takes a valid file, damages it once to three times (its structure, its JSON object, its bytes) and reads it. A
//! panic fails the test. What is accepted has to decode to `value[code] * scale` of its own fields, element for element, and
//! to survive being written and read again.

use std::cell::Cell;
use std::fmt::Write as _;

use half::bf16;
use halfbyte::four_bit::Spec;
use halfbyte::state::quantized_weights;
use halfbyte::{Error, Kind, QuantState};
use proptest::test_runner::{Config, TestRunner};
use safetensors::{Dtype, SafeTensors, View};

const CASES: u32 = 100_000;
const NAME: &str = "model.layers.0.mlp.weight";

/// `splitmix64`: proptest gives the seed of a case, and prints it when the case fails.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }
}

/// A tensor as the file will claim it to be, true or not.
#[derive(Clone)]
struct Entry {
    name: String,
    dtype: String,
    shape: Vec<u64>,
    data: Vec<u8>,
}

#[derive(Clone)]
struct File(Vec<Entry>);

impl File {
    fn of(state: &QuantState) -> Self {
        let mut entries: Vec<Entry> = state
            .to_tensors(NAME)
            .unwrap()
            .into_iter()
            .map(|(name, tensor)| Entry {
                name,
                dtype: tensor.dtype().to_string(),
                shape: tensor.shape().iter().map(|&d| d as u64).collect(),
                data: tensor.data().into_owned(),
            })
            .collect();
        entries.push(Entry {
            name: "model.layers.0.mlp.bias".into(),
            dtype: "F32".into(),
            shape: vec![2],
            data: vec![0; 8],
        });
        Self(entries)
    }

    /// The safetensors form. Offsets tile the data, so that lies of shape and dtype are found by whoever compares.
    fn serialize(&self) -> Vec<u8> {
        let mut header = String::from("{");
        let mut at = 0;
        for entry in &self.0 {
            let end = at + entry.data.len();
            let comma = if at == 0 && header.len() == 1 { "" } else { "," };
            let Entry { name, dtype, shape, .. } = entry;
            write!(header, r#"{comma}"{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{at},{end}]}}"#)
                .expect("a String takes all");
            at = end;
        }
        header.push('}');
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        self.0.iter().for_each(|entry| bytes.extend(&entry.data));
        bytes
    }

    fn json(&mut self) -> Option<&mut Vec<u8>> {
        self.0.iter_mut().find(|e| e.name.contains("quant_state")).map(|e| &mut e.data)
    }
}

/// Valid files of every kind of scale, storage dtype and size class.
fn valid_files() -> Vec<File> {
    let mut files = Vec::new();
    let mut random = Random(1);
    let storages = [Dtype::U8, Dtype::F16, Dtype::BF16, Dtype::F32];
    for (i, &n) in [0, 1, 31, 64, 65, 200, 1000, 9000].iter().enumerate() {
        for (j, (kind, double_quant)) in
            [(Kind::Nf4, false), (Kind::Nf4, true), (Kind::Fp4, false), (Kind::Fp4, true)].into_iter().enumerate()
        {
            let weights: Vec<f32> = (0..n).map(|_| random.below(2001) as f32 / 1000.0 - 1.0).collect();
            let block = [32, 64, 4096][(i + j) % 3];
            let mut state = QuantState::quantize(&weights, &[1, n], Spec { kind, block, double_quant }).unwrap();
            state.storage = storages[i % 4];
            files.push(File::of(&state));
        }
    }
    files
}

const DTYPES: [&str; 12] = ["U8", "I8", "F16", "BF16", "F32", "F64", "I64", "BOOL", "F8_E4M3", "F4", "F6_E2M3", "X7"];
const NAMES: [&str; 8] = [
    "",
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
    ".quant_state.bitsandbytes__int4",
];
const NUMBERS: [u64; 12] = [0, 1, 2, 15, 16, 255, 256, 257, 4096, 1 << 31, 1 << 62, u64::MAX];
const VALUES: [&str; 30] = [
    "0",
    "1",
    "-1",
    "32",
    "64",
    "128",
    "4096",
    "64.0",
    "1e3",
    "1e999",
    "-1e38",
    "18446744073709551615",
    "18446744073709551616",
    "NaN",
    "Infinity",
    "-Infinity",
    "null",
    "true",
    "\"nf4\"",
    "\"fp4\"",
    "\"float32\"",
    "\"bfloat16\"",
    "\"\\ud800\"",
    "[]",
    "[1]",
    "[0, 18446744073709551615]",
    "[4294967296, 4294967296]",
    "[[1]]",
    "{}",
    "\"",
];
const KEYS: [&str; 9] = [
    "quant_type",
    "blocksize",
    "dtype",
    "shape",
    "nested_blocksize",
    "nested_dtype",
    "nested_offset",
    "nested",
    "\\u0064type",
];

/// Changes what the file says of its tensors.
fn damage_structure(file: &mut File, random: &mut Random) {
    let i = random.below(file.0.len());
    match random.below(9) {
        0 => drop(file.0.remove(i)),
        1 => file.0[i].name = format!("{NAME}{}", random.pick(&NAMES)),
        2 => file.0[i].name += *random.pick(&["x", ".x", ".absmax"]),
        3 => file.0[i].dtype = (*random.pick(&DTYPES)).into(),
        4 => {
            // Another dtype, true to the number of bytes.
            let (dtype, size) = *random.pick(&[("U8", 1), ("I8", 1), ("F16", 2), ("BF16", 2), ("F32", 4), ("F64", 8)]);
            let entry = &mut file.0[i];
            entry.data.truncate(entry.data.len() / size * size);
            entry.shape = vec![(entry.data.len() / size) as u64];
            entry.dtype = dtype.into();
        }
        5 => {
            let value = *random.pick(&NUMBERS);
            let shape = &mut file.0[i].shape;
            match random.below(4) {
                0 => shape.push(value),
                1 => shape.insert(0, 1),
                2 => shape.clear(),
                _ => {
                    let last = shape.len().saturating_sub(1);
                    shape.truncate(last);
                    shape.push(value);
                }
            }
        }
        6 => {
            // Another length, true to it.
            let entry = &mut file.0[i];
            let claimed = entry.shape.iter().fold(1u64, |n, &d| n.saturating_mul(d)).max(1);
            let size = entry.data.len() / claimed as usize;
            let elements = *random.pick(&[0, 1, 2, 15, 16, 17, 141, 255, 256, 257]);
            entry.data.resize(elements * size, 0);
            entry.shape = vec![elements as u64];
        }
        7 => {
            let mut again = file.0[i].clone();
            again.name = format!("{NAME}{}", random.pick(&NAMES));
            file.0.push(again);
        }
        _ => {
            // NaN, infinities and others in a table of floats, or anything in the packed bytes.
            let data = &mut file.0[i].data;
            for _ in 0..=random.below(3) {
                let bytes = random.pick(&[f32::NAN, f32::INFINITY, -1.0, 0.5, 1e-40]).to_le_bytes();
                let at = random.below(data.len() / 4) * 4;
                if let Some(four) = data.get_mut(at..at + 4) {
                    four.copy_from_slice(&bytes);
                }
            }
        }
    }
}

/// Changes the JSON object.
fn damage_json(file: &mut File, random: &mut Random) {
    let Some(data) = file.json() else { return };
    let key = random.pick(&KEYS);
    if random.below(2) == 0 {
        let mut text = String::from_utf8_lossy(data).into_owned();
        let value = random.pick(&VALUES);
        let field = text.find(&format!("\"{key}\": ")).map(|start| {
            let value_start = start + key.len() + 4;
            let rest = &text[value_start..];
            let length = if rest.starts_with('[') { rest.find(']').map(|i| i + 1) } else { rest.find([',', '}']) };
            (start, value_start, value_start + length.unwrap_or(rest.len()))
        });
        match (random.below(4), field) {
            (0 | 1, Some((_, start, end))) => text.replace_range(start..end, value),
            (2, Some((start, _, end))) => text.replace_range(start..end, ""),
            _ => text.insert_str(text.find('{').map_or(0, |i| i + 1), &format!("\"{key}\": {value}, ")),
        }
        *data = text.into_bytes();
    } else {
        damage_bytes(data, random);
    }
    let length = data.len() as u64;
    if let Some(entry) = file.0.iter_mut().find(|e| e.name.contains("quant_state")) {
        entry.shape = vec![length]; // true to it: the object itself is to be read
    }
}

/// Changes bytes, knowing nothing of them.
fn damage_bytes(bytes: &mut Vec<u8>, random: &mut Random) {
    let at = random.below(bytes.len());
    let to = (at + random.below(40)).min(bytes.len());
    match random.below(5) {
        0 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
        1 if !bytes.is_empty() => bytes[at] = random.next() as u8,
        2 => bytes.truncate(at),
        3 => drop(bytes.drain(at..to)),
        _ => {
            let piece = bytes[at..to].to_vec();
            bytes.splice(at..at, piece);
        }
    }
}

/// A file made from `files` and the number `seed`.
fn damaged(files: &[File], seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut file = random.pick(files).clone();
    let mut raw = false;
    for _ in 0..=random.below(3) {
        match random.below(8) {
            0 => raw = true,
            1..=3 => damage_json(&mut file, &mut random),
            _ if !file.0.is_empty() => damage_structure(&mut file, &mut random),
            _ => {}
        }
    }
    let mut bytes = file.serialize();
    if raw {
        // The length and the header are what a reader trusts first.
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize + 8;
        let tail = bytes.split_off(if random.below(4) == 0 { bytes.len() } else { header });
        damage_bytes(&mut bytes, &mut random);
        bytes.extend(tail);
    }
    bytes
}

/// What an accepted weight has to be.
fn check_accepted(state: &QuantState) {
    let n = state.check().expect("what was accepted fits together");
    assert_eq!(n, state.shape.iter().product::<usize>());
    let scales = state.scales.view();
    let expected: Vec<f32> = (0..n)
        .map(|i| {
            let code = state.packed[i / 2] >> (4 * (1 - i % 2)) & 15;
            state.kind.values()[code as usize] * scales.get(i / state.block)
        })
        .collect();
    let equal = |a: f32, b: f32| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
    let decoded = state.dequantize::<f32>().unwrap();
    assert_eq!(decoded.len(), n);
    assert!(decoded.iter().zip(&expected).all(|(&a, &b)| equal(a, b)));
    let decoded = state.dequantize::<bf16>().unwrap();
    assert!(decoded.iter().zip(&expected).all(|(&a, &b)| equal(a.to_f32(), bf16::from_f32(b).to_f32())));

    let written = safetensors::serialize(state.to_tensors(NAME).unwrap(), None).unwrap();
    let again = QuantState::from_safetensors(&SafeTensors::deserialize(&written).unwrap(), NAME).unwrap();
    assert_eq!(safetensors::serialize(again.to_tensors(NAME).unwrap(), None).unwrap(), written);
}

#[test]
fn damaged_files_give_errors_or_weights() {
    let files = valid_files();
    let (opened, accepted, refused) = (Cell::new(0), Cell::new(0), Cell::new(0));
    let count = |cell: &Cell<u32>| cell.set(cell.get() + 1);
    let config = Config { cases: CASES, failure_persistence: None, ..Config::default() };
    TestRunner::new(config)
        .run(&proptest::num::u64::ANY, |seed| {
            let bytes = damaged(&files, seed);
            let Ok(file) = SafeTensors::deserialize(&bytes) else { return Ok(()) };
            count(&opened);
            assert!(quantized_weights(&file).len() <= file.len());
            match QuantState::from_safetensors(&file, NAME) {
                Ok(state) => {
                    count(&accepted);
                    check_accepted(&state);
                }
                Err(Error::Checkpoint { key, expected, got }) => {
                    count(&refused);
                    assert!(key.starts_with(NAME), "{key}");
                    assert!(!expected.is_empty() && !got.is_empty() && expected.len() + got.len() < 1000);
                }
                Err(other) => panic!("not an error of the checkpoint: {other}"),
            }
            Ok(())
        })
        .unwrap();
    // The damage must reach what is tested, or nothing is.
    let [opened, accepted, refused] = [opened.get(), accepted.get(), refused.get()];
    assert!(opened > CASES / 3 && accepted > CASES / 50 && refused > CASES / 5, "{opened} {accepted} {refused}");
}

#[test]
fn undamaged_files_are_accepted() {
    for file in valid_files() {
        let bytes = file.serialize();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(quantized_weights(&file), [NAME]);
        check_accepted(&QuantState::from_safetensors(&file, NAME).unwrap());
    }
}

#[test]
fn every_truncation_is_refused() {
    for file in &valid_files()[16..24] {
        let bytes = file.serialize();
        for length in 0..bytes.len() {
            assert!(SafeTensors::deserialize(&bytes[..length]).is_err());
        }
        // Truncated tensors in a file that is whole.
        for i in 0..file.0.len() - 1 {
            let mut file = file.clone();
            let entry = &mut file.0[i];
            let size = entry.data.len() / entry.shape.iter().product::<u64>() as usize;
            entry.data.truncate(entry.data.len() - size);
            entry.shape[0] -= 1;
            let name = entry.name.clone();
            let bytes = file.serialize();
            let error = QuantState::from_safetensors(&SafeTensors::deserialize(&bytes).unwrap(), NAME).unwrap_err();
            assert!(matches!(&error, Error::Checkpoint { key, .. } if *key == name), "{error}");
        }
    }
}
