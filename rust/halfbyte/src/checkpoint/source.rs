//! A checkpoint to read from: one safetensors file, or a folder with one or with shards and their index.
//!
//! Everything in it is untrusted. File names in an index are names and no paths; every tensor is in one file only, and in the
//! one that the index says. Tensors are read with positions rather than mapped: a file that shrinks under a map is a signal that
//! ends the process, and pages of a map count as memory of it.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use safetensors::Dtype as Stored;

use super::header::{self, Pairs, brief};
use super::{file_error, path_text};
use crate::error::{Error, Result};

const SUFFIX: &str = ".safetensors";
const INDEX_SUFFIX: &str = ".safetensors.index.json";
/// Bytes of JSON that an index or config may have.
const MAX_JSON: u64 = 200_000_000;

/// A tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: Stored,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Bytes it takes.
    pub bytes: u64,
    file: usize,
    start: u64,
}

impl Tensor {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&d| d as u64).product()
    }
}

struct Shard {
    path: PathBuf,
    name: String,
    length: u64,
}

/// An open checkpoint: what it holds is known, nothing is read yet.
pub struct Source {
    /// The folder, where the checkpoint is one.
    folder: Option<PathBuf>,
    stem: String,
    shards: Vec<Shard>,
    tensors: Vec<Tensor>,
    by_name: HashMap<String, usize>,
}

impl Source {
    /// Opens a file or a folder.
    ///
    /// # Errors
    /// [`Error::File`] if a file cannot be read, [`Error::Checkpoint`] if one is damaged, lies or contradicts another.
    pub fn open(path: &Path) -> Result<Self> {
        let folder = path.metadata().map_err(|e| file_error("read", path_text(path), &e))?.is_dir();
        let (stem, names) = if folder { find_files(path)? } else { (file_stem(path)?, None) };
        let mut source = Self {
            folder: folder.then(|| path.to_owned()),
            stem,
            shards: Vec::new(),
            tensors: Vec::new(),
            by_name: HashMap::new(),
        };
        match names {
            None => source.add(path)?,
            Some((names, map)) => {
                for name in &names {
                    source.add(&path.join(name))?;
                }
                source.check_index(&map)?;
            }
        }
        Ok(source)
    }

    /// The tensors, in the order of the files and of the data in each.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.by_name.get(name).map(|&i| &self.tensors[i])
    }

    /// What files are called before `.safetensors`: `model` as a rule.
    pub(super) fn stem(&self) -> &str {
        &self.stem
    }

    pub(super) fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// Names, lengths and times of the files: what changes when the checkpoint does.
    pub(super) fn identity(&self) -> Result<Vec<String>> {
        self.shards
            .iter()
            .map(|shard| {
                let failed = |e: std::io::Error| file_error("read", path_text(&shard.path), &e);
                let changed = shard.path.metadata().and_then(|m| m.modified()).map_err(failed)?;
                let since = changed.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
                Ok(format!("{} {} {since}", shard.name, shard.length))
            })
            .collect()
    }

    /// Reads `out.len()` bytes of a tensor, from its byte `at` on.
    pub(super) fn read(&self, tensor: &Tensor, at: u64, out: &mut [u8]) -> Result<()> {
        let shard = &self.shards[tensor.file];
        let failed = |e: std::io::Error| file_error("read", path_text(&shard.path), &e);
        let mut file = File::open(&shard.path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        if length != shard.length {
            let got = format!("{length}: it changed while it was read");
            return Err(Error::checkpoint(&shard.name, format!("{} bytes", shard.length), got));
        }
        assert!(at + out.len() as u64 <= tensor.bytes, "a read beyond a tensor");
        file.seek(SeekFrom::Start(tensor.start + at)).map_err(failed)?;
        file.read_exact(out).map_err(failed)
    }

    /// All bytes of a tensor.
    pub(super) fn read_all(&self, tensor: &Tensor) -> Result<Vec<u8>> {
        let mut bytes = vec![0; tensor.bytes as usize];
        self.read(tensor, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// The text of a JSON file beside the tensors, if there is one.
    pub(super) fn text(&self, name: &str) -> Result<Option<String>> {
        let Some(path) = self.folder.as_ref().map(|folder| folder.join(name)).filter(|path| path.is_file()) else {
            return Ok(None);
        };
        read_text(&path).map(Some)
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let failed = |e: std::io::Error| file_error("read", path_text(path), &e);
        let mut file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(Error::checkpoint(&name, "a file", "something else"));
        }
        let (entries, data) = header::read(&mut file, metadata.len(), &name)?;
        let number = self.shards.len();
        for entry in entries {
            let place = self.tensors.len();
            if let Some(other) = self.by_name.insert(entry.name.clone(), place) {
                let got = format!("one in `{}` too", self.shards[self.tensors[other].file].name);
                return Err(Error::checkpoint(brief(&entry.name), format!("one tensor, that in `{name}`"), got));
            }
            self.tensors.push(Tensor {
                bytes: entry.bytes(),
                start: data + entry.start,
                name: entry.name,
                dtype: entry.dtype,
                shape: entry.shape,
                file: number,
            });
        }
        self.shards.push(Shard { path: path.to_owned(), name, length: metadata.len() });
        Ok(())
    }

    /// Compares an index with what the files hold.
    fn check_index(&self, map: &[(String, String)]) -> Result<()> {
        for (tensor, file) in map {
            let found = self.get(tensor).map(|t| &self.shards[t.file].name);
            if found != Some(file) {
                let got = found.map_or("no such tensor".into(), |f| format!("it in `{f}`"));
                return Err(Error::checkpoint(brief(tensor), format!("it in `{file}`, as the index says"), got));
            }
        }
        Ok(())
    }
}

fn file_stem(path: &Path) -> Result<String> {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    match name.strip_suffix(SUFFIX) {
        Some(stem) if !stem.is_empty() => Ok(stem.to_owned()),
        _ => Err(Error::checkpoint(path_text(path), "a folder, or a file that ends in .safetensors", "another file")),
    }
}

type Found = (String, Option<(Vec<String>, Vec<(String, String)>)>);

/// The stem of a folder's checkpoint, the names of its files, and what the index says of tensors.
fn find_files(folder: &Path) -> Result<Found> {
    let failed = |e: std::io::Error| file_error("read", path_text(folder), &e);
    let mut names = BTreeSet::new();
    for entry in folder.read_dir().map_err(failed)? {
        if let Ok(name) = entry.map_err(failed)?.file_name().into_string() {
            names.insert(name);
        }
    }
    let indices: Vec<_> = names.iter().filter_map(|n| n.strip_suffix(INDEX_SUFFIX)).collect();
    let files: Vec<_> = names.iter().filter_map(|n| n.strip_suffix(SUFFIX)).collect();
    // transformers takes the single file where it finds both; and `model` is what it looks for.
    let pick = |stems: &[&str]| match stems {
        [only] => Some((*only).to_owned()),
        stems => stems.contains(&"model").then(|| "model".to_owned()),
    };
    if let Some(stem) = pick(&files).filter(|stem| indices.is_empty() || indices.contains(&&stem[..])) {
        return Ok((stem.clone(), Some((vec![stem + SUFFIX], Vec::new()))));
    }
    if let Some(stem) = pick(&indices) {
        let name = format!("{stem}{INDEX_SUFFIX}");
        let map = parse_index(&read_text(&folder.join(&name))?, &name)?;
        let files: BTreeSet<String> = map.iter().map(|(_, file)| file.clone()).collect();
        return Ok((stem, Some((files.into_iter().collect(), map))));
    }
    let got = match (files.len(), indices.len()) {
        (0, 0) => "neither".to_owned(),
        (files, indices) => format!("{files} files and {indices} indices, none of them `model`"),
    };
    Err(Error::checkpoint(path_text(folder), "a safetensors file, or an index of shards", got))
}

/// What an index says: the file of each tensor.
fn parse_index(text: &str, name: &str) -> Result<Vec<(String, String)>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: Pairs<String>,
    }
    let wrong = |got: String| Error::checkpoint(name, "an index of safetensors files", got);
    let index: Index = serde_json::from_str(text).map_err(|e| wrong(brief(&e.to_string())))?;
    let found = index.weight_map.0;
    for (tensor, file) in &found {
        if !is_plain_name(file) || !file.ends_with(SUFFIX) {
            let expected = "the name of a safetensors file in the same folder";
            return Err(Error::checkpoint(format!("{}` in `{name}", brief(tensor)), expected, brief(file)));
        }
    }
    if found.is_empty() {
        return Err(wrong("an empty `weight_map`".into()));
    }
    Ok(found)
}

/// Whether a name is that of a file in a folder, and leads nowhere else.
pub(super) fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0', ':'])
}

pub(super) fn read_text(path: &Path) -> Result<String> {
    let failed = |e: std::io::Error| file_error("read", path_text(path), &e);
    let mut text = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(MAX_JSON + 1).read_to_end(&mut text).map_err(failed)?;
    let got = text.len() as u64;
    if got > MAX_JSON {
        return Err(Error::checkpoint(path_text(path), format!("at most {MAX_JSON} bytes"), "more"));
    }
    String::from_utf8(text).map_err(|_| Error::checkpoint(path_text(path), "UTF-8 text", "other bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_an_index_lead_nowhere_else() {
        for name in ["model.safetensors", "model-00001-of-00002.safetensors", "..safetensors"] {
            assert!(is_plain_name(name), "{name}");
        }
        for name in ["", ".", "..", "../a.safetensors", "/etc/a.safetensors", "a/b.safetensors", "a\\b", "c:b", "a\0b"]
        {
            assert!(!is_plain_name(name), "{name}");
            let text = serde_json::json!({"weight_map": {"w": name}}).to_string();
            assert!(parse_index(&text, "i").unwrap_err().to_string().contains("same folder"), "{name}");
        }
        for text in ["", "[]", "{}", r#"{"weight_map": []}"#, r#"{"weight_map": {"a": 1}}"#, r#"{"weight_map": {}}"#] {
            assert!(matches!(parse_index(text, "i"), Err(Error::Checkpoint { .. })), "{text}");
        }
    }
}
