//! The JSON object of a checkpoint: a flat one, as Python's `json` module writes it and byte for byte so.
//!
//! Python writes (and reads) `NaN`, `Infinity` and `-Infinity`, which JSON does not have; they do occur, as the offset of a
//! weight that has such values. Hence a reader of this one form, strict in all else: no key twice, none unknown, every value of
//! its type and in its range.

use std::fmt::Write as _;

use crate::codebook::Kind;
use crate::element::Dtype;
use crate::error::{Error, Result};
use crate::layout;

/// What the JSON object says.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    pub(crate) block: usize,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) nested: Option<NestedHeader>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct NestedHeader {
    pub(crate) block: usize,
    pub(crate) offset: f32,
}

const KEYS: [&str; 7] =
    ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"];

impl Header {
    /// The text, as Python's `json.dumps` writes it.
    pub(super) fn to_text(&self) -> String {
        let shape = self.shape.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        let mut text = format!(
            r#"{{"quant_type": "{}", "blocksize": {}, "dtype": "{}", "shape": [{shape}]"#,
            self.kind.name(),
            self.block,
            self.dtype.name(),
        );
        if let Some(nested) = self.nested {
            let offset = python_float(f64::from(nested.offset));
            write!(
                text,
                r#", "nested_blocksize": {}, "nested_dtype": "float32", "nested_offset": {offset}"#,
                nested.block
            )
            .expect("writing to a String cannot fail");
        }
        text.push('}');
        text
    }

    /// Reads the text of the tensor `key`.
    pub(crate) fn parse(bytes: &[u8], key: &str) -> Result<Self> {
        let text = std::str::from_utf8(bytes)
            .map_err(|e| Error::checkpoint(key, "UTF-8 text", format!("a bad byte at {}", e.valid_up_to())))?;
        Reader { rest: text, key }.header()
    }
}

/// A float as Python's `repr` writes it: the shortest digits that read back the same, with an exponent below 1e-4 and from 1e16.
fn python_float(value: f64) -> String {
    if value.is_nan() {
        return "NaN".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "Infinity" } else { "-Infinity" }.into();
    }
    // `{:e}` has the fewest digits that read back the same, but where two texts are as near it may not take the even one. Asking
    // for that many digits does; what it gives need not read back (at powers of two), and then there was no choice.
    let shortest = format!("{value:e}");
    let (digits, exponent) = shortest.split_once('e').expect("`{:e}` writes an e");
    let exponent: i32 = exponent.parse().expect("`{:e}` writes an integer after the e");
    let decimals = digits.split_once('.').map_or(0, |(_, decimals)| decimals.len());
    let even = format!("{value:.decimals$e}");
    let scientific = if even.parse() == Ok(value) { &even } else { &shortest };
    let digits = scientific.split('e').next().expect("split gives one part at least");
    if (-4..16).contains(&exponent) {
        return format!("{value:.0$}", (decimals as i32 - exponent).max(1) as usize);
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// A value of the flat object. Numbers stay text: whoever asks knows whether an integer or a float is wanted.
#[derive(Debug)]
enum Value<'a> {
    Text(String),
    Number(&'a str),
    List(Vec<&'a str>),
}

impl Value<'_> {
    fn describe(&self) -> String {
        match self {
            Self::Text(text) => format!("the text {:?}", brief(text)),
            Self::Number(text) => format!("the number {}", brief(text)),
            Self::List(items) => format!("a list of {}", items.len()),
        }
    }
}

/// At most the first 40 characters: error messages do not grow with the file.
fn brief(text: &str) -> String {
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

struct Reader<'a> {
    rest: &'a str,
    key: &'a str,
}

impl<'a> Reader<'a> {
    fn header(mut self) -> Result<Header> {
        let mut values: [Option<Value<'a>>; KEYS.len()] = Default::default();
        self.expect('{')?;
        if !self.accept('}') {
            loop {
                let name = self.string()?;
                self.expect(':')?;
                let value = self.value()?;
                let slot = KEYS.iter().position(|&k| k == name).ok_or_else(|| {
                    Error::checkpoint(self.key, format!("JSON keys {}", KEYS.join(", ")), format!("`{}`", brief(&name)))
                })?;
                if values[slot].replace(value).is_some() {
                    return Err(Error::checkpoint(self.key, format!("`{name}` once"), "it twice"));
                }
                if !self.accept(',') {
                    break;
                }
            }
            self.expect('}')?;
        }
        self.skip_space();
        if !self.rest.is_empty() {
            return Err(self.unexpected("the end of the JSON object"));
        }
        self.interpret(values)
    }

    fn interpret(&self, values: [Option<Value<'a>>; KEYS.len()]) -> Result<Header> {
        let [quant_type, blocksize, dtype, shape, nested_blocksize, nested_dtype, nested_offset] = values;

        let kind = self.text(KEYS[0], quant_type, "nf4 or fp4", Kind::from_name)?;
        let is_block = |text: &str| parse_integer(text).filter(|&b| layout::check_four_bit_block(b).is_ok());
        let block = self.number(KEYS[1], blocksize, "a power of two from 32 to 4096", is_block)?;
        let dtype = self.text(KEYS[2], dtype, "float32, float16 or bfloat16", Dtype::from_name)?;
        let sizes = "a list of sizes whose product fits the memory";
        let shape = match self.required(KEYS[3], shape, sizes)? {
            Value::List(items) => items
                .iter()
                .map(|item| parse_integer(item))
                .collect::<Option<Vec<_>>>()
                .filter(|shape| super::numel(shape).is_some())
                .ok_or_else(|| self.wrong(KEYS[3], sizes, format!("[{}]", brief(&items.join(", ")))))?,
            other => return Err(self.wrong(KEYS[3], sizes, other.describe())),
        };

        let nested = if nested_blocksize.is_none() && nested_dtype.is_none() && nested_offset.is_none() {
            None
        } else {
            let positive = |text: &str| parse_integer(text).filter(|&b| b > 0);
            let block = self.number(KEYS[4], nested_blocksize, "a positive integer", positive)?;
            self.text(KEYS[5], nested_dtype, "float32", |name| (name == "float32").then_some(()))?;
            let offset = self.number(KEYS[6], nested_offset, "a number in the range of fp32", parse_offset)?;
            Some(NestedHeader { block, offset })
        };
        Ok(Header { kind, block, dtype, shape, nested })
    }

    fn required(&self, name: &str, value: Option<Value<'a>>, expected: &str) -> Result<Value<'a>> {
        value.ok_or_else(|| self.wrong(name, expected, "nothing"))
    }

    fn text<R>(
        &self,
        name: &str,
        value: Option<Value<'a>>,
        expected: &str,
        read: impl Fn(&str) -> Option<R>,
    ) -> Result<R> {
        let value = self.required(name, value, expected)?;
        let read = if let Value::Text(text) = &value { read(text) } else { None };
        read.ok_or_else(|| self.wrong(name, expected, value.describe()))
    }

    fn number<R>(
        &self,
        name: &str,
        value: Option<Value<'a>>,
        expected: &str,
        read: impl Fn(&str) -> Option<R>,
    ) -> Result<R> {
        let value = self.required(name, value, expected)?;
        let read = if let Value::Number(text) = value { read(text) } else { None };
        read.ok_or_else(|| self.wrong(name, expected, value.describe()))
    }

    fn wrong(&self, name: &str, expected: &str, got: impl ToString) -> Error {
        Error::checkpoint(self.key, format!("`{name}` to be {expected}"), got)
    }

    // What follows is the grammar.

    fn value(&mut self) -> Result<Value<'a>> {
        self.skip_space();
        match self.rest.as_bytes().first() {
            Some(b'"') => self.string().map(Value::Text),
            Some(b'[') => {
                self.expect('[')?;
                let mut items = Vec::new();
                if !self.accept(']') {
                    loop {
                        items.push(self.number_token()?);
                        if !self.accept(',') {
                            break;
                        }
                    }
                    self.expect(']')?;
                }
                Ok(Value::List(items))
            }
            _ => self.number_token().map(Value::Number),
        }
    }

    /// A number of JSON, or one of the three of Python's.
    fn number_token(&mut self) -> Result<&'a str> {
        self.skip_space();
        let end = self.rest.find([',', ']', '}', ' ', '\t', '\n', '\r', ':', '"', '[', '{']).unwrap_or(self.rest.len());
        let (token, rest) = self.rest.split_at(end);
        let pythonic = ["NaN", "Infinity", "-Infinity"].contains(&token);
        if !pythonic && !is_json_number(token) {
            return Err(self.unexpected("a text, a number or a list of numbers"));
        }
        self.rest = rest;
        Ok(token)
    }

    fn string(&mut self) -> Result<String> {
        self.skip_space();
        let mut escaped = false;
        let end = self
            .rest
            .strip_prefix('"')
            .and_then(|body| {
                body.find(|c| match c {
                    _ if escaped => {
                        escaped = false;
                        false
                    }
                    '\\' => {
                        escaped = true;
                        false
                    }
                    c => c == '"',
                })
            })
            .ok_or_else(|| self.unexpected("a text in quotes"))?;
        let (token, rest) = self.rest.split_at(end + 2); // with both quotes
        let text = serde_json::from_str(token).map_err(|_| self.unexpected("a text without control characters"))?;
        self.rest = rest;
        Ok(text)
    }

    fn skip_space(&mut self) {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\n', '\r']);
    }

    fn accept(&mut self, c: char) -> bool {
        self.skip_space();
        self.rest.strip_prefix(c).is_some_and(|rest| {
            self.rest = rest;
            true
        })
    }

    fn expect(&mut self, c: char) -> Result<()> {
        if self.accept(c) { Ok(()) } else { Err(self.unexpected(&format!("`{c}`"))) }
    }

    fn unexpected(&self, expected: &str) -> Error {
        let got = if self.rest.is_empty() { "the end of the text".into() } else { format!("`{}`", brief(self.rest)) };
        Error::checkpoint(self.key, format!("{expected} in the JSON object"), got)
    }
}

/// `-? (0 | [1-9][0-9]*) (. [0-9]+)? ([eE] [+-]? [0-9]+)?`
fn is_json_number(token: &str) -> bool {
    fn digits(text: &str) -> Option<&str> {
        let rest = text.trim_start_matches(|c: char| c.is_ascii_digit());
        (rest.len() < text.len()).then_some(rest)
    }
    fn rest_of_number(token: &str) -> Option<&str> {
        let unsigned = token.strip_prefix('-').unwrap_or(token);
        let mut rest = match unsigned.strip_prefix('0') {
            Some(rest) => rest,
            None => digits(unsigned)?,
        };
        if let Some(fraction) = rest.strip_prefix('.') {
            rest = digits(fraction)?;
        }
        if let Some(exponent) = rest.strip_prefix(['e', 'E']) {
            rest = digits(exponent.strip_prefix(['+', '-']).unwrap_or(exponent))?;
        }
        Some(rest)
    }
    rest_of_number(token) == Some("")
}

/// An integer from 0 to `usize::MAX`, written as one.
fn parse_integer(token: &str) -> Option<usize> {
    token.parse().ok()
}

/// A number that fp32 can hold (rounded), or one of the three that are none.
fn parse_offset(token: &str) -> Option<f32> {
    match token {
        "NaN" => Some(f32::NAN),
        "Infinity" => Some(f32::INFINITY),
        "-Infinity" => Some(f32::NEG_INFINITY),
        number => number.parse::<f64>().map(|value| value as f32).ok().filter(|value| value.is_finite()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [70, 65]}"#;
    const NESTED: &str = r#"{"quant_type": "fp4", "blocksize": 4096, "dtype": "float16", "shape": [1, 2, 3], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 2.641058921813965}"#;

    fn parse(text: &str) -> Result<Header> {
        Header::parse(text.as_bytes(), "w.quant_state.bitsandbytes__nf4")
    }

    #[test]
    fn text_survives_byte_for_byte() {
        for text in [PLAIN, NESTED] {
            assert_eq!(parse(text).unwrap().to_text(), text);
        }
        for offset in [
            "NaN",
            "Infinity",
            "-Infinity",
            "9.999999350456404e-39",
            "-0.0",
            "1.0000000272564224e+16",
            "16777216.0",
            "1.401298464324817e-45",
        ] {
            let text = NESTED.replace("2.641058921813965", offset);
            assert_eq!(parse(&text).unwrap().to_text(), text, "{offset}");
        }
    }

    #[test]
    fn floats_are_written_as_python_writes_them() {
        let cases: [(f64, &str); 15] = [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (100.0, "100.0"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (123456789012345680.0, "1.2345678901234568e+17"),
            (1.164_924_621_582_031_25, "1.1649246215820312"), // a tie
            (2f64.powi(-44), "5.684341886080802e-14"),
            (2f64.powi(-149), "1.401298464324817e-45"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (f64::from(0.1f32), "0.10000000149011612"),
            (f64::from(f32::MAX), "3.4028234663852886e+38"),
        ];
        for (value, text) in cases {
            assert_eq!(python_float(value), text);
        }
    }

    #[test]
    fn other_spacing_and_order_are_read() {
        let text = "\n{ \"shape\":[ 2 ,\t3 ] ,\"dtype\":\"float\\u00332\",\"blocksize\":32,\"quant_type\":\"fp4\"}\r\n";
        let header = parse(text).unwrap();
        assert_eq!(header, Header { kind: Kind::Fp4, block: 32, dtype: Dtype::F32, shape: vec![2, 3], nested: None });
    }

    #[test]
    fn what_is_wrong_is_named() {
        let cases = [
            ("", "the end of the text"),
            ("[]", "`{`"),
            ("{}", "quant_type"),
            (&PLAIN[..PLAIN.len() - 1], "`}`"),
            (&PLAIN.replace("]}", "]} x"), "the end of the JSON object"),
            (&PLAIN.replace("\"nf4\"", "\"nf5\""), "quant_type"),
            (&PLAIN.replace("\"nf4\"", "4"), "quant_type"),
            (&PLAIN.replace("\"nf4\"", "null"), "a text, a number"),
            (&PLAIN.replace("\"nf4\"", "{\"a\": 1}"), "a text, a number"),
            (&PLAIN.replace("64", "63"), "blocksize"),
            (&PLAIN.replace("64", "64.0"), "blocksize"),
            (&PLAIN.replace("64", "064"), "a text, a number"),
            (&PLAIN.replace("64", "-64"), "blocksize"),
            (&PLAIN.replace("64", "\"64\""), "blocksize"),
            (&PLAIN.replace("64", "99999999999999999999999999"), "blocksize"),
            (&PLAIN.replace("bfloat16", "int8"), "dtype"),
            (&PLAIN.replace("[70, 65]", "70"), "shape"),
            (&PLAIN.replace("[70, 65]", "[70, -65]"), "shape"),
            (&PLAIN.replace("[70, 65]", "[70, NaN]"), "shape"),
            (&PLAIN.replace("[70, 65]", "[[70, 65]]"), "a text, a number"),
            (&PLAIN.replace("[70, 65]", "[4294967296, 4294967296]"), "shape"),
            (&PLAIN.replace("\"dtype\"", "\"blocksize\""), "`blocksize` once"),
            (&PLAIN.replace("\"dtype\"", "\"dtypf\""), "`dtypf`"),
            (&NESTED.replace("256", "0"), "nested_blocksize"),
            (&NESTED.replace("float32", "float16"), "nested_dtype"),
            (&NESTED.replace("2.641058921813965", "1e39"), "nested_offset"),
            (&NESTED.replace("2.641058921813965", "1e999999"), "nested_offset"),
            (&NESTED.replace("2.641058921813965", "\"1\""), "nested_offset"),
            (&NESTED.replace(", \"nested_offset\": 2.641058921813965", ""), "nested_offset"),
        ];
        for (text, name) in cases {
            let error = parse(text).unwrap_err();
            assert!(matches!(&error, Error::Checkpoint { key, .. } if key == "w.quant_state.bitsandbytes__nf4"));
            assert!(error.to_string().contains(name), "{text}: {error}");
        }
        assert!(Header::parse(b"{\"quant_type\": \"\xff\"}", "k").unwrap_err().to_string().contains("UTF-8"));
    }

    #[test]
    fn messages_do_not_grow_with_the_file() {
        let long = "é".repeat(100_000);
        for text in [format!("{{\"{long}\": 1}}"), format!("{{\"quant_type\": \"{long}\"}}"), long] {
            assert!(parse(&text).unwrap_err().to_string().len() < 500);
        }
    }
}
