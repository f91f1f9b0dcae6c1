//! The header of a safetensors file: read without trusting it, written without the data being there yet.
//!
//! A file is eight bytes with the length of the header, the header (a JSON object, spaces after it allowed), and the data,
//! which the tensors tile without a gap. What a header says is compared with the length of the file before anything is
//! allocated by it.

use std::fmt::{self, Write as _};
use std::io::{Read, Seek, SeekFrom};
use std::marker::PhantomData;

use safetensors::Dtype as Stored;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};

use super::file_error;
use crate::error::{Error, Result};

/// Bytes of the length before the header.
pub(super) const LENGTH_BYTES: u64 = 8;
/// What safetensors itself reads at most.
const MAX_HEADER: u64 = 100_000_000;

/// A tensor as a header describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) dtype: Stored,
    pub(super) shape: Vec<usize>,
    /// Where its bytes are, from the start of the data.
    pub(super) start: u64,
    pub(super) end: u64,
}

impl Entry {
    pub(super) fn bytes(&self) -> u64 {
        self.end - self.start
    }
}

/// A JSON object with its keys in order, none of them twice.
pub(super) struct Pairs<T>(pub(super) Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Pairs<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Collect<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Collect<T> {
            type Value = Pairs<T>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
                let mut pairs = Vec::new();
                let mut seen = std::collections::HashSet::new();
                while let Some((key, value)) = map.next_entry::<String, T>()? {
                    if !seen.insert(key.clone()) {
                        return Err(serde::de::Error::custom(format!("`{}` twice", brief(&key))));
                    }
                    pairs.push((key, value));
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Collect(PhantomData))
    }
}

/// At most the first 80 characters: messages do not grow with the file.
pub(super) fn brief(text: &str) -> String {
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// Reads the header of a file of `length` bytes that is called `name` in errors: its tensors in the order of their data, and
/// where the data begins.
pub(super) fn read(file: &mut (impl Read + Seek), length: u64, name: &str) -> Result<(Vec<Entry>, u64)> {
    let failed = |e: std::io::Error| file_error("read", name, &e);
    if length < LENGTH_BYTES {
        return Err(Error::checkpoint(name, "a safetensors file", format!("{length} bytes")));
    }
    let mut bytes = [0; LENGTH_BYTES as usize];
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    file.read_exact(&mut bytes).map_err(failed)?;
    let header = u64::from_le_bytes(bytes);
    if header > MAX_HEADER || header > length - LENGTH_BYTES {
        let room = (length - LENGTH_BYTES).min(MAX_HEADER);
        return Err(Error::checkpoint(name, format!("a header of at most {room} bytes"), header));
    }
    let mut text = vec![0; header as usize];
    file.read_exact(&mut text).map_err(failed)?;
    let start = LENGTH_BYTES + header;
    Ok((parse(&text, length - start, name)?, start))
}

/// Reads the text of a header before `data` bytes.
pub(super) fn parse(text: &[u8], data: u64, file: &str) -> Result<Vec<Entry>> {
    let wrong = |got: String| Error::checkpoint(file, "a safetensors header", got);
    let objects: Pairs<serde_json::Value> = serde_json::from_slice(text).map_err(|e| wrong(brief(&e.to_string())))?;
    let mut entries = Vec::with_capacity(objects.0.len());
    for (name, object) in objects.0 {
        if name != "__metadata__" {
            entries.push(entry(name, &object, file)?);
        }
    }
    // An empty tensor has the offset of its neighbour, and comes before it.
    entries.sort_by_key(|e: &Entry| (e.start, e.end));
    let mut at = 0;
    for e in &entries {
        if e.start != at {
            let got = format!("offsets {}..{}", e.start, e.end);
            return Err(tensor_error(file, &e.name, format!("data from {at} on, without gap or overlap"), got));
        }
        at = e.end;
    }
    if at != data {
        return Err(Error::checkpoint(
            file,
            format!("{at} bytes of data, as the header says"),
            format!("{data} bytes"),
        ));
    }
    Ok(entries)
}

fn tensor_error(file: &str, name: &str, expected: impl ToString, got: impl ToString) -> Error {
    Error::checkpoint(format!("{}` in `{file}", brief(name)), expected, got)
}

/// A field of the object that describes a tensor.
fn field<'a, T: Deserialize<'a>>(
    object: &'a serde_json::Value,
    field: &str,
    expected: &str,
    wrong: impl Fn(String, &str) -> Error,
) -> Result<T> {
    let value = object.get(field).ok_or_else(|| wrong(format!("a `{field}`"), "none"))?;
    T::deserialize(value).map_err(|_| wrong(format!("`{field}` to be {expected}"), "something else"))
}

fn entry(name: String, object: &serde_json::Value, file: &str) -> Result<Entry> {
    let wrong = |expected: String, got: &str| tensor_error(file, &name, expected, got);
    let dtype: Stored = field(object, "dtype", "a dtype of safetensors", wrong)?;
    let shape: Vec<usize> = field(object, "shape", "a list of sizes", wrong)?;
    let [start, end]: [u64; 2] = field(object, "data_offsets", "two offsets", wrong)?;
    if end < start {
        return Err(wrong("`data_offsets`, the second not before the first".into(), "the other way round"));
    }
    match byte_len(dtype, &shape) {
        Some(bytes) if bytes == end - start => Ok(Entry { name, dtype, shape, start, end }),
        bytes => {
            let expected = bytes.map_or("a size that a file can have".into(), |b| format!("{b} bytes for its shape"));
            Err(tensor_error(file, &name, expected, format!("{} bytes", end - start)))
        }
    }
}

/// Bytes of a tensor, if they are whole and their number fits.
pub(super) fn byte_len(dtype: Stored, shape: &[usize]) -> Option<u64> {
    let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64))?;
    let bits = elements.checked_mul(dtype.bitsize() as u64)?;
    (bits % 8 == 0).then_some(bits / 8)
}

/// The text of a header, with spaces up to `length` bytes; without `length` as long as it is.
///
/// # Panics
/// If it is longer than `length`.
pub(super) fn to_text<'a>(entries: impl Iterator<Item = &'a Entry>, length: Option<usize>) -> String {
    let mut text = String::from(r#"{"__metadata__":{"format":"pt"}"#);
    for Entry { name, dtype, shape, start, end } in entries {
        let name = serde_json::Value::from(name.as_str());
        let shape = shape.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        write!(text, r#",{name}:{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{start},{end}]}}"#)
            .expect("a String takes all");
    }
    text.push('}');
    if let Some(length) = length {
        assert!(text.len() <= length, "a header is longer than what was kept free for it");
        text.extend(std::iter::repeat_n(' ', length - text.len()));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"U8","shape":[3],"data_offsets":[8,11]},
        "a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"none":{"dtype":"F32","shape":[0],"data_offsets":[8,8]}}"#;

    fn read_text(text: &str, data: usize) -> Result<(Vec<Entry>, u64)> {
        let mut file = (text.len() as u64).to_le_bytes().to_vec();
        file.extend(text.as_bytes());
        file.extend(vec![0; data]);
        let length = file.len() as u64;
        read(&mut std::io::Cursor::new(file), length, "model.safetensors")
    }

    #[test]
    fn entries_come_in_the_order_of_the_data_and_survive_writing() {
        let (entries, start) = read_text(GOOD, 11).unwrap();
        assert_eq!(start, 8 + GOOD.len() as u64);
        assert_eq!(entries.iter().map(|e| &e.name[..]).collect::<Vec<_>>(), ["a", "none", "b"]);
        let text = to_text(entries.iter(), Some(400));
        assert_eq!(text.len(), 400);
        assert_eq!(read_text(&text, 11).unwrap().0, entries);
        assert_eq!(safetensors::SafeTensors::read_metadata(&file(&text, 11)).unwrap().1.data_len(), 11);
    }

    fn file(text: &str, data: usize) -> Vec<u8> {
        let mut file = (text.len() as u64).to_le_bytes().to_vec();
        file.extend(text.as_bytes());
        file.extend(vec![0; data]);
        file
    }

    #[test]
    fn lies_are_named() {
        let cases = [
            (GOOD.replace("[8,11]", "[8,10]"), "`b` in `model.safetensors`: expected 3 bytes"),
            (GOOD.replace("[8,11]", "[7,10]"), "without gap or overlap"),
            (GOOD.replace("[8,11]", "[9,12]"), "without gap or overlap"),
            (GOOD.replace("[8,11]", "[11,8]"), "the second not before the first"),
            (GOOD.replace("[8,11]", "[-8,11]"), "two offsets"),
            (GOOD.replace("[8,11]", "[8]"), "two offsets"),
            (GOOD.replace("[3]", "[4]"), "expected 4 bytes"),
            (GOOD.replace("[3]", "[4294967296,4294967296]"), "a size that a file can have"),
            (GOOD.replace("[3]", "3"), "a list of sizes"),
            (GOOD.replace("U8", "U7"), "a dtype"),
            (GOOD.replace("\"b\"", "\"a\""), "`a` twice"),
            (GOOD.replace("\"dtype\":\"U8\",", ""), "a `dtype`"),
            (GOOD.replace('}', ""), "a safetensors header"),
            ("[]".into(), "a safetensors header"),
            ("{}".into(), "0 bytes of data"),
        ];
        for (text, says) in cases {
            let error = read_text(&text, 11).unwrap_err().to_string();
            assert!(error.contains(says), "{text}\n{error}");
        }
        assert!(read_text(GOOD, 10).unwrap_err().to_string().contains("11 bytes of data"));
        for length in [0u64, 3, 7] {
            let mut short = std::io::Cursor::new(vec![0; length as usize]);
            assert!(read(&mut short, length, "x").unwrap_err().to_string().contains("a safetensors file"));
        }
        let mut huge = std::io::Cursor::new(u64::MAX.to_le_bytes());
        assert!(read(&mut huge, 8, "x").unwrap_err().to_string().contains("at most 0 bytes"));
    }
}
