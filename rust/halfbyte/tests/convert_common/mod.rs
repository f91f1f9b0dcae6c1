//! Checkpoints on disk for the tests of conversions, and what is in them.
#![allow(dead_code, reason = "each test file uses a part of this")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use safetensors::{Dtype, SafeTensors, View};

/// `splitmix64`: proptest gives the seed of a case, and prints it when the case fails.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    pub(crate) fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    /// Sums of uniform numbers: enough like weights.
    pub(crate) fn weight(&mut self) -> f32 {
        (0..4).map(|_| self.below(2001) as f32 / 1000.0 - 1.0).sum::<f32>() * 0.1
    }
}

/// A folder that is gone when the test is.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("halfbyte-convert-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Stored {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<u8>,
}

impl View for &Stored {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        (&self.data[..]).into()
    }
    fn data_len(&self) -> usize {
        self.data.len()
    }
}

pub(crate) type Tensors = BTreeMap<String, Stored>;

/// A tensor of random floats.
pub(crate) fn floats(random: &mut Random, dtype: Dtype, shape: &[usize]) -> Stored {
    let count = shape.iter().product();
    let mut data = Vec::new();
    for _ in 0..count {
        let v = random.weight();
        match dtype {
            Dtype::F32 => data.extend(v.to_le_bytes()),
            Dtype::F16 => data.extend(half::f16::from_f32(v).to_le_bytes()),
            Dtype::BF16 => data.extend(half::bf16::from_f32(v).to_le_bytes()),
            _ => data.extend((0..dtype.bitsize() / 8).map(|_| random.next() as u8)),
        }
    }
    Stored { dtype, shape: shape.to_vec(), data }
}

/// A small Llama, whose weights have ragged sizes and any of the dtypes.
pub(crate) fn llama(random: &mut Random) -> Tensors {
    let mut tensors = Tensors::new();
    for layer in 0..=random.below(3) {
        for name in ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"] {
            let dtype = *random.pick(&[Dtype::BF16, Dtype::BF16, Dtype::F16, Dtype::F32]);
            let shape = [1 + random.below(90), 1 + random.below(90)];
            let tensor = floats(random, dtype, &shape);
            tensors.insert(format!("model.layers.{layer}.{name}.weight"), tensor);
        }
        let size = 1 + random.below(50);
        tensors.insert(format!("model.layers.{layer}.input_layernorm.weight"), floats(random, Dtype::F32, &[size]));
        tensors.insert(format!("model.layers.{layer}.position_ids"), floats(random, Dtype::I64, &[3]));
    }
    tensors.insert("model.embed_tokens.weight".into(), floats(random, Dtype::BF16, &[40, 16]));
    tensors.insert("lm_head.weight".into(), floats(random, Dtype::BF16, &[40, 16]));
    tensors.insert("odd".into(), floats(random, Dtype::U8, &[7]));
    tensors.insert("none".into(), floats(random, Dtype::F16, &[0, 3]));
    tensors
}

pub(crate) const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "eps": 1e-06}"#;

/// Writes tensors as a checkpoint of `shards` files.
pub(crate) fn write(folder: &Path, tensors: &Tensors, shards: usize) {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("config.json"), CONFIG).unwrap();
    fs::write(folder.join("tokenizer.json"), "{}").unwrap();
    let names: Vec<&String> = tensors.keys().collect();
    let mut map = serde_json::Map::new();
    for (i, names) in names.chunks(names.len().div_ceil(shards)).enumerate() {
        let file = if shards == 1 { "model.safetensors".into() } else { format!("model-{i}.safetensors") };
        let views = names.iter().map(|name| (name.as_str(), &tensors[*name]));
        fs::write(folder.join(&file), safetensors::serialize(views, None).unwrap()).unwrap();
        map.extend(names.iter().map(|name| ((*name).clone(), file.clone().into())));
    }
    if shards > 1 {
        let index = serde_json::json!({"weight_map": map}).to_string();
        fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
    }
}

/// All tensors of a checkpoint, each at an offset that is a multiple of its element's size.
pub(crate) fn read(folder: &Path) -> Tensors {
    let mut tensors = Tensors::new();
    for (name, bytes) in files(folder) {
        if !name.ends_with(".safetensors") {
            continue;
        }
        let file = SafeTensors::deserialize(&bytes).unwrap();
        for (name, view) in file.iter() {
            let at = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
            assert_eq!(at % (view.dtype().bitsize() / 8), 0, "{name} is not aligned");
            let stored = Stored { dtype: view.dtype(), shape: view.shape().to_vec(), data: view.data().to_vec() };
            assert!(tensors.insert(name.to_owned(), stored).is_none(), "{name} twice");
        }
    }
    tensors
}

/// Names and bytes of the files below a folder.
pub(crate) fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in next.read_dir().unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
            } else {
                let name = entry.path().strip_prefix(folder).unwrap().display().to_string();
                found.insert(name, fs::read(entry.path()).unwrap());
            }
        }
    }
    found
}
