//! Conversions of whole checkpoints: what comes out is what quantizing each weight by itself gives, interrupted or not.

mod convert_common;

use std::fs;

use convert_common::*;
use half::{bf16, f16};
use halfbyte::checkpoint::{
    Action, Conversion, DequantizeOptions, Existing, Part, QuantizeOptions, Scheme, Why, inspect,
};
use halfbyte::four_bit::{self, Spec};
use halfbyte::{Element, Error, Kind, QuantState};
use proptest::test_runner::{Config, TestRunner};
use safetensors::{Dtype, View};

const STORAGES: [Dtype; 5] = [Dtype::U8, Dtype::I8, Dtype::F16, Dtype::BF16, Dtype::F32];

fn cases(count: u32, test: impl Fn(&mut Random)) {
    let mut runner = TestRunner::new(Config { cases: count, failure_persistence: None, ..Config::default() });
    let run = |seed| {
        test(&mut Random(seed));
        Ok(())
    };
    runner.run(&proptest::num::u64::ANY, run).unwrap();
}

fn elements<T: Element>(tensor: &Stored, from: impl Fn(&[u8]) -> T) -> Vec<T> {
    tensor.data.chunks(size_of::<T>()).map(from).collect()
}

fn as_f32(tensor: &Stored) -> Vec<f32> {
    match tensor.dtype {
        Dtype::F32 => elements(tensor, |b| f32::from_le_bytes(b.try_into().unwrap())),
        Dtype::F16 => {
            elements(tensor, |b| f16::from_le_bytes(b.try_into().unwrap())).iter().map(|v| v.to_f32()).collect()
        }
        _ => elements(tensor, |b| bf16::from_le_bytes(b.try_into().unwrap())).iter().map(|v| v.to_f32()).collect(),
    }
}

/// A weight quantized by itself, from `f32` values that its dtype has exactly.
fn quantized(tensor: &Stored, spec: Spec, search: bool, storage: Dtype) -> QuantState {
    fn of<T: Element>(values: &[f32], shape: &[usize], spec: Spec, search: bool) -> QuantState {
        let values: Vec<T> = values.iter().map(|&v| T::from_f32(v)).collect();
        let mut state = QuantState::quantize(&values, shape, spec).unwrap();
        if search {
            let searched = four_bit::quantize_search(&values, spec).unwrap();
            (state.packed, state.scales) = (searched.packed, searched.absmax.into());
        }
        state
    }
    let (values, shape) = (as_f32(tensor), &tensor.shape);
    let mut state = match tensor.dtype {
        Dtype::F32 => of::<f32>(&values, shape, spec, search),
        Dtype::F16 => of::<f16>(&values, shape, spec, search),
        _ => of::<bf16>(&values, shape, spec, search),
    };
    state.storage = storage;
    state
}

fn is_linear(name: &str) -> bool {
    name.ends_with("_proj.weight")
}

#[test]
fn every_weight_is_as_quantized_by_itself_and_everything_else_is_untouched() {
    cases(60, |random| {
        let folder = Folder::new();
        let tensors = llama(random);
        write(&folder.join("src"), &tensors, 1 + random.below(4));
        let spec = Spec {
            kind: *random.pick(&[Kind::Nf4, Kind::Fp4]),
            block: *random.pick(&[32, 64, 256, 4096]),
            double_quant: random.below(2) == 0,
        };
        let options = QuantizeOptions {
            scheme: Scheme::FourBit(spec),
            scale_search: random.below(3) == 0,
            storage: *random.pick(&STORAGES),
            shard_size: 1 + random.below(30_000) as u64,
            ..QuantizeOptions::default()
        };
        let mut conversion = Conversion::quantize(&folder.join("src"), &folder.join("dst"), &options).unwrap();
        let mut reported = Vec::new();
        let summary = conversion.run(|done, _| reported.push(done)).unwrap();
        assert_eq!(reported, (0..=conversion.items().len()).collect::<Vec<_>>());

        let mut out = read(&folder.join("dst"));
        assert_eq!(summary.bytes_written, out.values().map(|t| t.data.len() as u64).sum::<u64>());
        for (name, tensor) in &tensors {
            if !is_linear(name) {
                assert_eq!(out.remove(name).as_ref(), Some(tensor), "{name}");
                continue;
            }
            let state = quantized(tensor, spec, options.scale_search, options.storage);
            for (name, part) in state.to_tensors(name).unwrap() {
                let found = out.remove(&name).unwrap();
                assert_eq!((found.dtype, &found.shape[..]), (part.dtype(), part.shape()), "{name}");
                assert_eq!(found.data, part.data().into_owned(), "{name}");
            }
        }
        assert!(out.is_empty(), "{:?}", out.keys());
        let files = files(&folder.join("dst"));
        assert!(files.contains_key("tokenizer.json") && files.contains_key("config.json"));
        assert!(!files.keys().any(|name| name.starts_with(".halfbyte")));
        assert_eq!(files.contains_key("model.safetensors.index.json"), summary.files > 1);

        let back = DequantizeOptions { shard_size: options.shard_size, ..DequantizeOptions::default() };
        Conversion::dequantize(&folder.join("dst"), &folder.join("back"), &back).unwrap().run(|_, _| ()).unwrap();
        let mut out = read(&folder.join("back"));
        for (name, tensor) in &tensors {
            let found = out.remove(name).unwrap();
            assert_eq!((found.dtype, &found.shape), (tensor.dtype, &tensor.shape), "{name}");
            let expected = if is_linear(name) {
                let state = quantized(tensor, spec, options.scale_search, options.storage);
                state.dequantize::<f32>().unwrap()
            } else {
                assert_eq!(&found, tensor, "{name}");
                continue;
            };
            let rounded = |v: f32| match tensor.dtype {
                Dtype::F16 => f16::from_f32(v).to_f32(),
                Dtype::BF16 => bf16::from_f32(v).to_f32(),
                _ => v,
            };
            assert_eq!(as_f32(&found), expected.into_iter().map(rounded).collect::<Vec<_>>(), "{name}");
        }
        assert!(out.is_empty());
        let config = String::from_utf8(convert_common::files(&folder.join("back"))["config.json"].clone()).unwrap();
        assert!(config.contains("1e-06") && !config.contains("quantization_config"), "{config}");
    });
}

#[test]
fn int8_rows_are_rounded_to_nearest() {
    cases(20, |random| {
        let folder = Folder::new();
        let tensors = llama(random);
        write(&folder.join("src"), &tensors, 1);
        let options = QuantizeOptions { scheme: Scheme::Int8, ..QuantizeOptions::default() };
        Conversion::quantize(&folder.join("src"), &folder.join("dst"), &options).unwrap().run(|_, _| ()).unwrap();
        let out = read(&folder.join("dst"));
        for (name, tensor) in tensors.iter().filter(|(name, _)| is_linear(name)) {
            let module = name.strip_suffix(".weight").unwrap();
            let (codes, scales) = (&out[name], &out[&format!("{module}.SCB")]);
            assert_eq!(out[&format!("{module}.weight_format")].data, [0]);
            assert_eq!((codes.dtype, &codes.shape), (Dtype::I8, &tensor.shape));
            let values: Vec<f64> = as_f32(tensor).iter().map(|&v| f16::from_f32(v).to_f64()).collect();
            for ((row, codes), scale) in
                values.chunks(tensor.shape[1]).zip(codes.data.chunks(tensor.shape[1])).zip(as_f32(scales))
            {
                let most = row.iter().fold(0.0, |most: f64, v| most.max(v.abs()));
                assert_eq!(f64::from(scale), most);
                for (v, &q) in row.iter().zip(codes) {
                    let exact = if most == 0.0 { 0.0 } else { v * 127.0 / most };
                    assert!((f64::from(q as i8) - exact).abs() <= 0.5001, "{v} of {most}: {}", q as i8);
                }
            }
        }
        let back = DequantizeOptions { dtype: Some(halfbyte::Dtype::F32), ..DequantizeOptions::default() };
        Conversion::dequantize(&folder.join("dst"), &folder.join("back"), &back).unwrap().run(|_, _| ()).unwrap();
        let out = read(&folder.join("back"));
        for (name, tensor) in tensors.iter().filter(|(name, _)| is_linear(name)) {
            let most = as_f32(tensor).iter().fold(0.0, |most: f32, v| most.max(v.abs()));
            for (a, b) in as_f32(tensor).iter().zip(as_f32(&out[name])) {
                assert!((a - b).abs() <= most / 220.0, "{a} {b}");
            }
        }
    });
}

#[test]
fn interrupted_anywhere_and_resumed_the_bytes_are_the_same() {
    cases(30, |random| {
        let folder = Folder::new();
        write(&folder.join("src"), &llama(random), 1 + random.below(3));
        let spec = Spec { double_quant: true, ..Spec::default() };
        let mut options = QuantizeOptions {
            scheme: Scheme::FourBit(spec),
            shard_size: 1 + random.below(9000) as u64,
            ..QuantizeOptions::default()
        };
        let plan = |to: &str, options: &QuantizeOptions<'_>| {
            Conversion::quantize(&folder.join("src"), &folder.join(to), options)
        };
        plan("whole", &options).unwrap().run(|_, _| ()).unwrap();
        options.existing = Existing::Resume;
        loop {
            let mut conversion = plan("parts", &options).unwrap();
            let mut steps = random.below(9);
            while conversion.next().unwrap().is_some() {
                if steps == 0 {
                    break;
                }
                steps -= 1;
                conversion.convert(&four_bit::mean).unwrap();
            }
            if conversion.next().unwrap().is_none() {
                conversion.finish().unwrap();
                break;
            }
            // Dropped here. What is there under its own name is whole.
            drop(conversion);
            let whole = files(&folder.join("whole"));
            for (name, bytes) in files(&folder.join("parts")) {
                assert!(name.starts_with(".halfbyte") || whole[&name] == bytes, "{name}");
            }
            if random.below(4) == 0 {
                fs::write(folder.join("parts/.halfbyte/partial"), b"what a kill left").unwrap();
            }
            // Each attempt has to end: one shard more at least.
            if random.below(3) == 0 {
                plan("parts", &options).unwrap().run(|_, _| ()).unwrap();
                break;
            }
        }
        assert_eq!(files(&folder.join("parts")), files(&folder.join("whole")));
    });
}

fn message<T>(result: Result<T, Error>) -> String {
    result.err().map(|e| e.to_string()).unwrap_or_default()
}

#[test]
fn what_stands_in_the_way_is_said_before_anything_is_written() {
    let folder = Folder::new();
    let mut random = Random(7);
    write(&folder.join("src"), &llama(&mut random), 2);
    let run = |to: &str, options: &QuantizeOptions<'_>| {
        Conversion::quantize(&folder.join("src"), &folder.join(to), options)?.run(|_, _| ())
    };
    let refuse = QuantizeOptions { shard_size: 4000, ..QuantizeOptions::default() };
    let resume = QuantizeOptions { existing: Existing::Resume, shard_size: 4000, ..QuantizeOptions::default() };
    let overwrite = QuantizeOptions { existing: Existing::Overwrite, shard_size: 4000, ..QuantizeOptions::default() };

    assert!(message(run("src", &overwrite)).contains("where the checkpoint is read from"));
    fs::create_dir(folder.join("used")).unwrap();
    fs::write(folder.join("used/notes.txt"), "mine").unwrap();
    for options in [&refuse, &resume] {
        assert!(message(run("used", options)).contains("something"), "{}", message(run("used", options)));
    }
    assert_eq!(files(&folder.join("used")).len(), 1);
    run("used", &overwrite).unwrap();
    run("used", &overwrite).unwrap();
    assert_eq!(files(&folder.join("used"))["notes.txt"], b"mine");

    // Begun with other options, or by another one who computes.
    let mut begun = Conversion::quantize(&folder.join("src"), &folder.join("begun"), &refuse).unwrap();
    begun.next().unwrap();
    assert!(message(run("begun", &resume)).contains("another process"));
    drop(begun);
    assert!(message(run("begun", &refuse)).contains("interrupted"));
    let other = QuantizeOptions { existing: Existing::Resume, shard_size: 5000, ..QuantizeOptions::default() };
    assert!(message(run("begun", &other)).contains("shard 4000"));
    let other =
        QuantizeOptions { existing: Existing::Resume, shard_size: 4000, device: "cuda", ..QuantizeOptions::default() };
    assert!(message(run("begun", &other)).contains("device cpu"));
    run("begun", &resume).unwrap();
    run("fresh", &refuse).unwrap();
    assert_eq!(files(&folder.join("begun")), files(&folder.join("fresh")));

    // What is quantized is not quantized again; what is not is not decoded.
    let again = Conversion::quantize(&folder.join("fresh"), &folder.join("x"), &refuse);
    assert!(message(again).contains("not quantized"));
    let back = Conversion::dequantize(&folder.join("src"), &folder.join("x"), &DequantizeOptions::default());
    assert!(message(back).contains("that bitsandbytes quantized"));
    for (options, says) in [
        (QuantizeOptions { storage: Dtype::I64, ..QuantizeOptions::default() }, "storage"),
        (
            QuantizeOptions { scheme: Scheme::FourBit(Spec { block: 63, ..Spec::default() }), ..Default::default() },
            "blocksize",
        ),
    ] {
        assert!(message(run("x", &options)).contains(says));
    }
    assert!(!folder.join("x").exists());
}

#[test]
fn a_journal_of_another_source_is_not_resumed() {
    let folder = Folder::new();
    let tensors = llama(&mut Random(3));
    write(&folder.join("src"), &tensors, 1);
    let options = QuantizeOptions { existing: Existing::Resume, ..QuantizeOptions::default() };
    let plan = || Conversion::quantize(&folder.join("src"), &folder.join("dst"), &options);
    plan().unwrap().next().unwrap();
    let mut tensors = tensors;
    tensors.insert("more".into(), floats(&mut Random(1), Dtype::F32, &[3]));
    write(&folder.join("src"), &tensors, 1);
    assert!(message(plan().unwrap().run(|_, _| ())).contains("was another one"));
}

#[test]
fn a_source_that_changes_meanwhile_is_an_error() {
    let folder = Folder::new();
    write(&folder.join("src"), &llama(&mut Random(3)), 1);
    let options = QuantizeOptions::default();
    let mut conversion = Conversion::quantize(&folder.join("src"), &folder.join("dst"), &options).unwrap();
    let file = folder.join("src/model.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() - 5]).unwrap();
    assert!(message(conversion.run(|_, _| ())).contains("it changed while it was read"));
    assert!(!folder.join("dst/model.safetensors").exists() && !folder.join("dst/config.json").exists());
}

#[test]
fn somebody_else_may_quantize() {
    let folder = Folder::new();
    let tensors = llama(&mut Random(11));
    write(&folder.join("src"), &tensors, 1);
    let spec = Spec { double_quant: true, ..Spec::default() };
    let options = QuantizeOptions { scheme: Scheme::FourBit(spec), ..QuantizeOptions::default() };
    let plan = |to: &str| Conversion::quantize(&folder.join("src"), &folder.join(to), &options).unwrap();
    plan("own").run(|_, _| ()).unwrap();
    let mut conversion = plan("other");
    assert!(message(conversion.write(&[])).contains("an item that `next` gave out"));
    while let Some(i) = conversion.next().unwrap() {
        let item = conversion.items()[i].clone();
        let Action::Quantize { dtype, .. } = item.action else {
            assert!(message(conversion.read(&mut [])).contains("a weight to be quantized"));
            conversion.convert(&four_bit::mean).unwrap();
            continue;
        };
        let mut data = vec![0; tensors[&item.name].data.len()];
        assert!(message(conversion.read(&mut data[1..])).contains("bytes"));
        conversion.read(&mut data).unwrap();
        assert_eq!(data, tensors[&item.name].data);
        let stored = Stored { dtype: tensors[&item.name].dtype, shape: item.shape.clone(), data };
        assert_eq!(dtype.size(), stored.dtype.bitsize() / 8);
        let state = quantized(&stored, spec, false, Dtype::U8);
        let parts = state.to_tensors("").unwrap();
        let parts: Vec<_> =
            parts.iter().map(|(name, t)| (name.trim_start_matches('.'), View::dtype(t), t.data())).collect();
        let parts: Vec<_> = parts.iter().map(|(name, dtype, data)| Part { name, dtype: *dtype, data }).collect();
        assert!(message(conversion.write(&parts[1..])).contains("among them"));
        let mut wrong = parts.clone();
        wrong[0].dtype = Dtype::I8;
        assert!(matches!(conversion.write(&wrong), Err(Error::Dtype { .. })));
        let mut wrong = parts.clone();
        wrong[0].data = &wrong[0].data[1..];
        assert!(matches!(conversion.write(&wrong), Err(Error::Shape { .. })));
        assert!(message(conversion.write(&[&parts[..], &parts[..1]].concat())).contains("6 tensors"));
        conversion.write(&parts).unwrap();
    }
    conversion.finish().unwrap();
    assert_eq!(files(&folder.join("own")), files(&folder.join("other")));
}

#[test]
fn roles_show_in_the_plan_and_the_config() {
    let folder = Folder::new();
    let mut random = Random(5);
    let mut tensors = llama(&mut random);
    for name in ["mlp.experts.0.up_proj", "mlp.experts.1.up_proj", "mlp.gate", "self_attn.k_proj"] {
        tensors.insert(format!("model.layers.0.{name}.weight"), floats(&mut random, Dtype::BF16, &[8, 64]));
    }
    tensors.insert("model.layers.1.mlp.experts.down_proj".into(), floats(&mut random, Dtype::BF16, &[2, 8, 64]));
    write(&folder.join("src"), &tensors, 1);
    let options = |skip| QuantizeOptions { skip, ..QuantizeOptions::default() };
    let list = |options: &QuantizeOptions<'_>, to: &str| {
        Conversion::quantize(&folder.join("src"), &folder.join(to), options).unwrap().run(|_, _| ()).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&files(&folder.join(to))["config.json"]).unwrap();
        config["quantization_config"]["llm_int8_skip_modules"].clone()
    };
    assert_eq!(list(&options(&|_| false), "a"), serde_json::json!(["lm_head", "model.layers.0.mlp.gate"]));
    let skip = |name: &str| name.contains("experts") || name.ends_with("layers.0.self_attn.k_proj");
    let expected =
        ["lm_head", "model.layers.0.mlp.experts", "model.layers.0.mlp.gate", "model.layers.0.self_attn.k_proj"];
    assert_eq!(list(&options(&skip), "b"), serde_json::json!(expected));
    let conversion = Conversion::quantize(&folder.join("src"), &folder.join("c"), &options(&skip)).unwrap();
    let why = |name: &str| conversion.items().iter().find(|i| i.name == name).unwrap().action;
    assert_eq!(why("model.layers.0.mlp.experts.1.up_proj.weight"), Action::Keep(Why::Skipped));
    assert_eq!(why("model.embed_tokens.weight"), Action::Keep(Why::Embedding));
    assert_eq!(why("model.layers.1.mlp.experts.down_proj"), Action::Keep(Why::Skipped));
    let stacked = QuantizeOptions { stacked_experts: true, ..QuantizeOptions::default() };
    list(&stacked, "d");
    let found = inspect(&folder.join("d")).unwrap();
    let experts = found.iter().find(|w| w.name == "model.layers.1.mlp.experts.down_proj").unwrap();
    assert_eq!((&experts.scheme[..], &experts.shape[..], experts.elements), ("nf4", &[2, 8, 64][..], 1024));
}

#[test]
fn layers_that_lie_down_are_turned_and_turned_back() {
    let folder = Folder::new();
    let tensor = floats(&mut Random(1), Dtype::F32, &[40, 70]);
    let tensors = Tensors::from([("h.0.attn.c_attn.weight".to_owned(), tensor.clone())]);
    write(&folder.join("src"), &tensors, 1);
    fs::write(folder.join("src/config.json"), r#"{"model_type": "gpt2"}"#).unwrap();
    let spec = Spec { block: 32, ..Spec::default() };
    let options = QuantizeOptions { scheme: Scheme::FourBit(spec), ..QuantizeOptions::default() };
    Conversion::quantize(&folder.join("src"), &folder.join("dst"), &options).unwrap().run(|_, _| ()).unwrap();
    let values = as_f32(&tensor);
    let turned: Vec<f32> = (0..70 * 40).map(|i| values[i % 40 * 70 + i / 40]).collect();
    let state = QuantState::quantize(&turned, &[70, 40], spec).unwrap();
    assert_eq!(read(&folder.join("dst"))["h.0.attn.c_attn.weight"].data, state.packed);
    Conversion::dequantize(&folder.join("dst"), &folder.join("back"), &DequantizeOptions::default())
        .unwrap()
        .run(|_, _| ())
        .unwrap();
    let decoded = state.dequantize::<f32>().unwrap();
    let back: Vec<f32> = (0..70 * 40).map(|i| decoded[i % 70 * 40 + i / 70]).collect();
    assert_eq!(as_f32(&read(&folder.join("back"))["h.0.attn.c_attn.weight"]), back);
}

#[test]
fn a_dtype_given_is_that_of_every_float() {
    let folder = Folder::new();
    let tensors = llama(&mut Random(23));
    write(&folder.join("src"), &tensors, 1);
    let options = QuantizeOptions { dtype: Some(halfbyte::Dtype::F16), ..QuantizeOptions::default() };
    Conversion::quantize(&folder.join("src"), &folder.join("dst"), &options).unwrap().run(|_, _| ()).unwrap();
    let out = read(&folder.join("dst"));
    for (name, tensor) in &tensors {
        let half = || Stored {
            dtype: Dtype::F16,
            shape: tensor.shape.clone(),
            data: as_f32(tensor).iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        };
        let expected = match tensor.dtype {
            Dtype::F16 | Dtype::F32 | Dtype::BF16 => half(),
            _ => tensor.clone(),
        };
        if is_linear(name) {
            let state = quantized(&expected, Spec::default(), false, Dtype::U8);
            assert_eq!(out[name].data, state.packed, "{name}");
        } else {
            assert_eq!(out[name], expected, "{name}");
        }
    }
    let config: serde_json::Value = serde_json::from_slice(&files(&folder.join("dst"))["config.json"]).unwrap();
    assert_eq!(config["dtype"], "float16");
    assert_eq!(config["quantization_config"]["bnb_4bit_compute_dtype"], "float16");
}
