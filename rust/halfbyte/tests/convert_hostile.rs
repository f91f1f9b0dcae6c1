//! Damaged and lying checkpoints as the source of a conversion: a typed error or a result, never a panic, and never a file
//! outside the folder that was given.

mod convert_common;

use std::fs;
use std::path::Path;

use convert_common::*;
use halfbyte::Error;
use halfbyte::checkpoint::{Conversion, DequantizeOptions, QuantizeOptions, Scheme, Source, inspect};
use halfbyte::four_bit::Spec;
use proptest::test_runner::{Config, TestRunner};
use safetensors::Dtype;

const CASES: u32 = 1000;

/// Changes a file's bytes: a digit of its header, a bit anywhere, its length, the length of its header.
fn damage(random: &mut Random, bytes: &mut Vec<u8>) {
    if bytes.is_empty() {
        return;
    }
    let header = bytes.get(..8).map_or(0, |b| u64::from_le_bytes(b.try_into().unwrap()) as usize).min(bytes.len());
    match random.below(7) {
        0 => bytes.truncate(random.below(bytes.len())),
        1 => bytes.extend((0..=random.below(9)).map(|_| 0)),
        2 => {
            let at = random.below(bytes.len().min(8));
            bytes[at] ^= 1 << random.below(8);
        }
        3 => {
            let at = random.below(bytes.len());
            bytes[at] ^= 1 << random.below(8);
        }
        4 | 5 => {
            let digits: Vec<usize> =
                (0..header + 8).filter(|&i| bytes.get(i).is_some_and(u8::is_ascii_digit)).collect();
            if !digits.is_empty() {
                bytes[*random.pick(&digits)] = b'0' + random.below(10) as u8;
            }
        }
        _ => {
            let letters: Vec<usize> =
                (8..header + 8).filter(|&i| bytes.get(i).is_some_and(u8::is_ascii_alphabetic)).collect();
            if !letters.is_empty() {
                bytes[*random.pick(&letters)] = b'A' + random.below(57) as u8;
            }
        }
    }
}

fn is_typed(error: &Error) -> bool {
    matches!(error, Error::Checkpoint { .. } | Error::File { .. } | Error::Value { .. } | Error::Shape { .. })
}

/// All that can be done with a folder.
fn try_all(source: &Path, destination: &Path) {
    let spec = Spec { double_quant: true, ..Spec::default() };
    for scheme in [Scheme::FourBit(spec), Scheme::Int8] {
        let options = QuantizeOptions { scheme, stacked_experts: true, shard_size: 3000, ..QuantizeOptions::default() };
        let _ = fs::remove_dir_all(destination);
        let done = Conversion::quantize(source, destination, &options).and_then(|mut c| c.run(|_, _| ()));
        if let Err(error) = done {
            assert!(is_typed(&error), "{error:?}");
            assert!(error.to_string().len() < 2000, "{error}");
        }
    }
    let _ = fs::remove_dir_all(destination);
    let done =
        Conversion::dequantize(source, destination, &DequantizeOptions::default()).and_then(|mut c| c.run(|_, _| ()));
    if let Err(error) = done {
        assert!(is_typed(&error), "{error:?}");
    }
    if let Err(error) = inspect(source) {
        assert!(is_typed(&error), "{error:?}");
    }
}

#[test]
fn damaged_files_give_errors_or_results() {
    let sources = Folder::new();
    let mut tensors = llama(&mut Random(1));
    tensors.retain(|_, t| t.data.len() < 4000);
    tensors.insert("a.experts.up_proj".into(), floats(&mut Random(2), Dtype::BF16, &[2, 8, 16]));
    tensors.insert("a.q_proj.weight".into(), floats(&mut Random(2), Dtype::BF16, &[8, 16]));
    write(&sources.join("float"), &tensors, 1);
    write(&sources.join("shards"), &tensors, 3);
    for (name, scheme, double_quant) in [("nf4", Some(64), false), ("nested", Some(64), true), ("int8", None, false)] {
        let scheme =
            scheme.map_or(Scheme::Int8, |block| Scheme::FourBit(Spec { block, double_quant, ..Spec::default() }));
        let options = QuantizeOptions { scheme, ..QuantizeOptions::default() };
        Conversion::quantize(&sources.join("float"), &sources.join(name), &options).unwrap().run(|_, _| ()).unwrap();
    }
    let valid: Vec<_> = ["float", "shards", "nf4", "nested", "int8"].map(|name| files(&sources.join(name))).into();
    let mut runner = TestRunner::new(Config { cases: CASES, failure_persistence: None, ..Config::default() });
    runner
        .run(&proptest::num::u64::ANY, |seed| {
            let random = &mut Random(seed);
            let folder = Folder::new();
            fs::create_dir(folder.join("src")).unwrap();
            let mut files = random.pick(&valid).clone();
            for _ in 0..=random.below(3) {
                let names: Vec<String> = files.keys().filter(|n| *n != "tokenizer.json").cloned().collect();
                if names.is_empty() {
                    break;
                }
                let name = random.pick(&names).clone();
                if random.below(12) == 0 && files.len() > 1 {
                    files.remove(&name);
                } else {
                    damage(random, files.get_mut(&name).unwrap());
                }
            }
            for (name, bytes) in &files {
                fs::write(folder.join("src").join(name), bytes).unwrap();
            }
            try_all(&folder.join("src"), &folder.join("dst"));
            let beside: Vec<_> = folder.0.read_dir().unwrap().map(|e| e.unwrap().file_name()).collect();
            assert!(beside.iter().all(|name| name == "src" || name == "dst"), "{beside:?}");
            assert_eq!(convert_common::files(&folder.join("src")), files, "the source was written to");
            Ok(())
        })
        .unwrap();
}

fn message(source: &Path) -> String {
    Source::open(source).err().map(|e| e.to_string()).unwrap_or_default()
}

#[test]
fn an_index_cannot_lead_elsewhere_or_lie() {
    let folder = Folder::new();
    let tensors = llama(&mut Random(1));
    write(&folder.join("src"), &tensors, 2);
    fs::copy(folder.join("src/model-0.safetensors"), folder.join("outside.safetensors")).unwrap();
    let index = folder.join("src/model.safetensors.index.json");
    let good = fs::read_to_string(&index).unwrap();
    let absolute = folder.join("outside.safetensors").display().to_string();
    for name in ["../outside.safetensors", &absolute, "./model-0.safetensors", "..", "", "a\\b.safetensors"] {
        let lie = good.replace("\"model-0.safetensors\"", &serde_json::json!(name).to_string());
        fs::write(&index, lie).unwrap();
        assert!(message(&folder.join("src")).contains("in the same folder"), "{name}");
    }
    for (from, to, says) in [
        ("model-0", "model-7", "cannot read"),
        ("model-0.safetensors", "tokenizer.json", "in the same folder"),
        ("lm_head.weight", "lm_head.other", "no such tensor"),
        ("{\"weight_map\"", "{\"a\": {\"a\": 1}, \"weight_map", "an index"),
    ] {
        fs::write(&index, good.replace(from, to)).unwrap();
        let got = message(&folder.join("src"));
        assert!(got.contains(says), "{to}: {got}");
    }
    // A tensor in the other file than the index says.
    let mut map: serde_json::Value = serde_json::from_str(&good).unwrap();
    map["weight_map"]["lm_head.weight"] = "model-1.safetensors".into();
    fs::write(&index, map.to_string()).unwrap();
    assert!(message(&folder.join("src")).contains("as the index says"));
    // A tensor in both files.
    fs::write(&index, &good).unwrap();
    fs::copy(folder.join("src/model-0.safetensors"), folder.join("src/model-1.safetensors")).unwrap();
    assert!(message(&folder.join("src")).contains("too"), "{}", message(&folder.join("src")));
}

#[test]
fn states_that_lie_do_not_make_sizes() {
    let folder = Folder::new();
    let tensors = Tensors::from([("a.q_proj.weight".to_owned(), floats(&mut Random(1), Dtype::F32, &[8, 64]))]);
    write(&folder.join("src"), &tensors, 1);
    Conversion::quantize(&folder.join("src"), &folder.join("q"), &QuantizeOptions::default())
        .unwrap()
        .run(|_, _| ())
        .unwrap();
    let good = read(&folder.join("q"));
    let key = "a.q_proj.weight.quant_state.bitsandbytes__nf4";
    let text = String::from_utf8(good[key].data.clone()).unwrap();
    for lie in ["[8, 4294967296]", "[8, 4611686018427387904]", "[8, 63]", "[0, 0]", "[]"] {
        let mut tensors = good.clone();
        let data = text.replace("[8, 64]", lie).into_bytes();
        tensors.insert(key.into(), Stored { dtype: Dtype::U8, shape: vec![data.len()], data });
        write(&folder.join("lie"), &tensors, 1);
        let back = Conversion::dequantize(&folder.join("lie"), &folder.join("x"), &DequantizeOptions::default());
        assert!(matches!(back, Err(Error::Checkpoint { .. })), "{lie}");
        assert!(inspect(&folder.join("lie")).is_err());
    }
    for (remove, says) in [(key, "quant_state"), ("a.q_proj.weight", "no such tensor")] {
        let mut tensors = good.clone();
        tensors.remove(remove);
        write(&folder.join("lie"), &tensors, 1);
        let got = inspect(&folder.join("lie")).unwrap_err().to_string();
        assert!(got.contains(says), "{got}");
    }
    // Without its scales it is found, and not decoded; nothing of the result has a name then.
    let mut tensors = good.clone();
    tensors.remove("a.q_proj.weight.absmax");
    write(&folder.join("lie"), &tensors, 1);
    let mut back =
        Conversion::dequantize(&folder.join("lie"), &folder.join("x"), &DequantizeOptions::default()).unwrap();
    assert!(matches!(back.run(|_, _| ()), Err(Error::Checkpoint { .. })));
    assert!(!folder.join("x/model.safetensors").exists());
}

#[cfg(unix)]
#[test]
fn links_in_the_destination_are_replaced_and_not_followed() {
    let folder = Folder::new();
    write(&folder.join("src"), &llama(&mut Random(1)), 1);
    fs::create_dir_all(folder.join("dst/.halfbyte")).unwrap();
    fs::write(folder.join("victim"), "precious").unwrap();
    for name in ["dst/model.safetensors", "dst/config.json", "dst/tokenizer.json", "dst/.halfbyte/partial"] {
        std::os::unix::fs::symlink(folder.join("victim"), folder.join(name)).unwrap();
    }
    let options = QuantizeOptions { existing: halfbyte::checkpoint::Existing::Overwrite, ..QuantizeOptions::default() };
    Conversion::quantize(&folder.join("src"), &folder.join("dst"), &options).unwrap().run(|_, _| ()).unwrap();
    assert_eq!(fs::read_to_string(folder.join("victim")).unwrap(), "precious");
    fs::remove_dir_all(folder.join("dst")).unwrap();
    fs::create_dir(folder.join("dst")).unwrap();
    std::os::unix::fs::symlink(folder.join("src"), folder.join("dst/.halfbyte")).unwrap();
    let done = Conversion::quantize(&folder.join("src"), &folder.join("dst"), &options).unwrap().run(|_, _| ());
    assert!(matches!(done, Err(Error::File { .. })));
}
