//! GGUF's header: metadata and the table of tensors. Takes the file's first bytes; reads no tensor.
//!
//! Nothing in a file is believed: every count is held against the bytes that are there before memory is taken for it, and
//! every tensor against the file's length.

use crate::quant::Storage;
use rustc_hash::FxHashMap;

/// A parsed header.
#[derive(Debug, Clone)]
pub struct Gguf {
    /// Metadata by key.
    pub metadata: FxHashMap<String, MetaValue>,
    /// Tensors by GGUF's name.
    pub tensors: FxHashMap<String, GgufTensor>,
}

/// A metadata value. Arrays hold one type each; arrays of arrays are refused.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum MetaValue {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    Integers(Vec<i64>),
    Floats(Vec<f32>),
}

/// Where a tensor lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    /// Sizes with the fastest last, as Hugging Face and the rest of baton write them: `[out, in]`.
    pub shape: Vec<usize>,
    /// How its elements are stored.
    pub storage: Storage,
    /// Place of its first byte in the file.
    pub offset: u64,
    /// Its bytes.
    pub n_bytes: usize,
}

/// Why a header cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GgufError {
    /// The bytes end before the header does: give more of the file, if there is more.
    #[error("the header goes on past the first {given} bytes")]
    NeedMore {
        /// How many were given.
        given: usize,
    },
    /// Not a GGUF file.
    #[error("not a GGUF file")]
    Magic,
    /// Version 1, or one from the future.
    #[error("GGUF version {0} is not supported; 2 and 3 are")]
    Version(u32),
    /// A tensor stored in a way we do not read.
    #[error(
        "tensor {name}: element type {id} is not supported; F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K are"
    )]
    Storage {
        /// Whose.
        name: String,
        /// ggml's number of the type.
        id: u32,
    },
    /// Something that no writer produces.
    #[error("damaged GGUF header: {0}")]
    Damaged(String),
    /// A key that is needed and absent, or of another type.
    #[error("GGUF metadata lacks {0}")]
    Missing(String),
    /// A model that the engine does not compute.
    #[error("GGUF: {key} {found} is not supported, only {supported}")]
    Unsupported {
        /// The key.
        key: &'static str,
        /// What the file says.
        found: String,
        /// What would do.
        supported: &'static str,
    },
}

const MAX_DIMS: u32 = 4;
const MAX_NAME: usize = 4096;
const DEFAULT_ALIGNMENT: u64 = 32;

impl Gguf {
    /// Parses the header from a file's first bytes.
    ///
    /// # Errors
    /// [`GgufError::NeedMore`] if the header does not end within `bytes`.
    pub fn parse(bytes: &[u8], file_len: u64) -> Result<Self, GgufError> {
        let mut r = Reader { bytes, at: 0 };
        if r.take(4)? != b"GGUF" {
            return Err(GgufError::Magic);
        }
        let version = r.u32()?;
        if !(2..=3).contains(&version) {
            return Err(GgufError::Version(version));
        }
        let (n_tensors, n_keys) = (r.u64()?, r.u64()?);
        let mut metadata = FxHashMap::default();
        for _ in 0..n_keys {
            let key = r.text(MAX_NAME)?;
            let kind = r.u32()?;
            metadata.insert(key, r.value(kind)?);
        }
        let mut tensors = Vec::new();
        for _ in 0..n_tensors {
            tensors.push(r.tensor()?);
        }
        let alignment = match metadata.get("general.alignment") {
            Some(MetaValue::Unsigned(n)) if n.is_power_of_two() => *n,
            None => DEFAULT_ALIGNMENT,
            Some(_) => {
                return Err(GgufError::Damaged(
                    "alignment is no power of two".to_owned(),
                ));
            }
        };
        let data = (r.at as u64).next_multiple_of(alignment);
        let place = |(name, mut tensor): (String, GgufTensor)| {
            let start = data.checked_add(tensor.offset);
            let end = start.and_then(|start| start.checked_add(tensor.n_bytes as u64));
            match (start, end) {
                (Some(start), Some(end))
                    if end <= file_len && tensor.offset.is_multiple_of(alignment) =>
                {
                    tensor.offset = start;
                    Ok((name, tensor))
                }
                _ => Err(GgufError::Damaged(format!(
                    "tensor {name} lies outside the file or its alignment"
                ))),
            }
        };
        let tensors = tensors.into_iter().map(place).collect::<Result<_, _>>()?;
        Ok(Self { metadata, tensors })
    }

    /// A text under `key`.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.metadata.get(key)? {
            MetaValue::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A non-negative integer under `key`.
    pub fn unsigned(&self, key: &str) -> Option<u64> {
        match *self.metadata.get(key)? {
            MetaValue::Unsigned(n) => Some(n),
            MetaValue::Signed(n) => u64::try_from(n).ok(),
            _ => None,
        }
    }

    /// A number under `key`.
    pub fn float(&self, key: &str) -> Option<f64> {
        match *self.metadata.get(key)? {
            MetaValue::Float(x) => Some(x),
            _ => None,
        }
    }

    /// A truth value under `key`.
    pub fn flag(&self, key: &str) -> Option<bool> {
        match *self.metadata.get(key)? {
            MetaValue::Bool(flag) => Some(flag),
            _ => None,
        }
    }

    /// A list of texts under `key`.
    pub fn texts(&self, key: &str) -> Option<&[String]> {
        match self.metadata.get(key)? {
            MetaValue::Texts(texts) => Some(texts),
            _ => None,
        }
    }

    /// A list of integers under `key`.
    pub fn integers(&self, key: &str) -> Option<&[i64]> {
        match self.metadata.get(key)? {
            MetaValue::Integers(numbers) => Some(numbers),
            _ => None,
        }
    }

    /// A list of numbers under `key`.
    pub fn floats(&self, key: &str) -> Option<&[f32]> {
        match self.metadata.get(key)? {
            MetaValue::Floats(numbers) => Some(numbers),
            _ => None,
        }
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], GgufError> {
        let rest = &self.bytes[self.at..];
        let taken = rest.get(..n).ok_or(GgufError::NeedMore {
            given: self.bytes.len(),
        })?;
        self.at += n;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn text(&mut self, most: usize) -> Result<String, GgufError> {
        let n = self.u64()?;
        let n = usize::try_from(n).ok().filter(|&n| n <= most);
        let n =
            n.ok_or_else(|| GgufError::Damaged("a text longer than any writer writes".to_owned()))?;
        // Some vocabularies hold bytes that are no UTF-8.
        Ok(String::from_utf8_lossy(self.take(n)?).into_owned())
    }

    fn value(&mut self, kind: u32) -> Result<MetaValue, GgufError> {
        Ok(match kind {
            0 => MetaValue::Unsigned(u64::from(self.array::<1>()?[0])),
            1 => MetaValue::Signed(i64::from(i8::from_le_bytes(self.array()?))),
            2 => MetaValue::Unsigned(u64::from(u16::from_le_bytes(self.array()?))),
            3 => MetaValue::Signed(i64::from(i16::from_le_bytes(self.array()?))),
            4 => MetaValue::Unsigned(u64::from(self.u32()?)),
            5 => MetaValue::Signed(i64::from(i32::from_le_bytes(self.array()?))),
            6 => MetaValue::Float(f64::from(f32::from_le_bytes(self.array()?))),
            7 => MetaValue::Bool(self.array::<1>()?[0] != 0),
            8 => MetaValue::Text(self.text(usize::MAX)?),
            9 => self.list()?,
            10 => MetaValue::Unsigned(self.u64()?),
            11 => MetaValue::Signed(i64::from_le_bytes(self.array()?)),
            12 => MetaValue::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(GgufError::Damaged(format!("metadata type {other}"))),
        })
    }

    fn list(&mut self) -> Result<MetaValue, GgufError> {
        let kind = self.u32()?;
        let n = self.u64()?;
        let width = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            other => return Err(GgufError::Damaged(format!("a list of type {other}"))),
        };
        let rest = self.bytes.len() - self.at;
        let n = usize::try_from(n)
            .ok()
            .filter(|n| n.checked_mul(width).is_some_and(|bytes| bytes <= rest));
        let n = n.ok_or(GgufError::NeedMore {
            given: self.bytes.len(),
        })?;
        if kind == 8 {
            return (0..n)
                .map(|_| self.text(usize::MAX))
                .collect::<Result<_, _>>()
                .map(MetaValue::Texts);
        }
        if matches!(kind, 6 | 12) {
            let floats = (0..n).map(|_| match self.value(kind)? {
                MetaValue::Float(x) => Ok(x as f32),
                _ => Err(GgufError::Damaged("a list of numbers".to_owned())),
            });
            return floats.collect::<Result<_, _>>().map(MetaValue::Floats);
        }
        let integers = (0..n).map(|_| match self.value(kind)? {
            MetaValue::Unsigned(x) => Ok(i64::try_from(x).unwrap_or(i64::MAX)),
            MetaValue::Signed(x) => Ok(x),
            MetaValue::Bool(x) => Ok(i64::from(x)),
            _ => Err(GgufError::Damaged("a list of integers".to_owned())),
        });
        integers.collect::<Result<_, _>>().map(MetaValue::Integers)
    }

    /// A row of the tensor table; the offset counts from the data's start.
    fn tensor(&mut self) -> Result<(String, GgufTensor), GgufError> {
        let name = self.text(MAX_NAME)?;
        let n_dims = self.u32()?;
        if n_dims > MAX_DIMS {
            return Err(GgufError::Damaged(format!(
                "tensor {name} has {n_dims} dimensions"
            )));
        }
        let damaged = || GgufError::Damaged(format!("tensor {name} has impossible sizes"));
        let mut shape = Vec::with_capacity(n_dims as usize);
        for _ in 0..n_dims {
            shape.push(usize::try_from(self.u64()?).map_err(|_| damaged())?);
        }
        shape.reverse();
        let id = self.u32()?;
        let offset = self.u64()?;
        let storage = Storage::from_ggml(id).ok_or_else(|| GgufError::Storage {
            name: name.clone(),
            id,
        })?;
        // Nothing is ever stored in no bytes, and a size of zero would hide sizes whose product overflows.
        if shape.contains(&0) {
            return Err(damaged());
        }
        let row = shape.last().copied().unwrap_or(1);
        let rows = shape
            .iter()
            .rev()
            .skip(1)
            .try_fold(1usize, |n, &size| n.checked_mul(size))
            .ok_or_else(damaged)?;
        let n_bytes = storage
            .bytes_of(row)
            .and_then(|row| row.checked_mul(rows))
            .ok_or_else(damaged)?;
        Ok((
            name,
            GgufTensor {
                shape,
                storage,
                offset,
                n_bytes,
            },
        ))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Writes headers for tests.
    #[derive(Default)]
    pub(crate) struct Writer {
        keys: Vec<u8>,
        n_keys: u64,
        tensors: Vec<u8>,
        n_tensors: u64,
    }

    impl Writer {
        fn put_text(out: &mut Vec<u8>, text: &str) {
            out.extend((text.len() as u64).to_le_bytes());
            out.extend(text.as_bytes());
        }

        fn key(&mut self, key: &str, kind: u32) -> &mut Vec<u8> {
            self.n_keys += 1;
            Self::put_text(&mut self.keys, key);
            self.keys.extend(kind.to_le_bytes());
            &mut self.keys
        }

        pub(crate) fn text(mut self, key: &str, value: &str) -> Self {
            Self::put_text(self.key(key, 8), value);
            self
        }

        pub(crate) fn u32(mut self, key: &str, value: u32) -> Self {
            self.key(key, 4).extend(value.to_le_bytes());
            self
        }

        pub(crate) fn f32(mut self, key: &str, value: f32) -> Self {
            self.key(key, 6).extend(value.to_le_bytes());
            self
        }

        pub(crate) fn texts(mut self, key: &str, values: &[&str]) -> Self {
            let out = self.key(key, 9);
            out.extend(8u32.to_le_bytes());
            out.extend((values.len() as u64).to_le_bytes());
            values.iter().for_each(|text| Self::put_text(out, text));
            self
        }

        pub(crate) fn tensor(mut self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
            self.n_tensors += 1;
            Self::put_text(&mut self.tensors, name);
            self.tensors.extend((dims.len() as u32).to_le_bytes());
            dims.iter()
                .for_each(|d| self.tensors.extend(d.to_le_bytes()));
            self.tensors.extend(kind.to_le_bytes());
            self.tensors.extend(offset.to_le_bytes());
            self
        }

        pub(crate) fn header(&self) -> Vec<u8> {
            let mut out = b"GGUF".to_vec();
            out.extend(3u32.to_le_bytes());
            out.extend(self.n_tensors.to_le_bytes());
            out.extend(self.n_keys.to_le_bytes());
            out.extend(&self.keys);
            out.extend(&self.tensors);
            out
        }
    }

    fn sample() -> Vec<u8> {
        Writer::default()
            .text("general.architecture", "llama")
            .u32("llama.block_count", 2)
            .f32("x", 1.5)
            .texts("tokens", &["a", "ü"])
            .tensor("w", &[64, 3], 3, 32)
            .header()
    }

    #[test]
    fn a_header_is_read_with_the_fastest_size_last() {
        let bytes = sample();
        let gguf = Gguf::parse(&bytes, 1 << 20).unwrap();
        assert_eq!(gguf.text("general.architecture"), Some("llama"));
        assert_eq!(gguf.unsigned("llama.block_count"), Some(2));
        assert_eq!(gguf.texts("tokens").unwrap()[1], "ü");
        let tensor = &gguf.tensors["w"];
        assert_eq!(
            (tensor.shape.as_slice(), tensor.storage, tensor.n_bytes),
            ([3, 64].as_slice(), Storage::Q4_1, 120)
        );
        assert_eq!(
            tensor.offset,
            (bytes.len() as u64).next_multiple_of(32) + 32
        );
    }

    #[test]
    fn a_cut_header_asks_for_more_at_every_byte() {
        let bytes = sample();
        for n in 0..bytes.len() {
            assert_eq!(
                Gguf::parse(&bytes[..n], 1 << 20).unwrap_err(),
                GgufError::NeedMore { given: n }
            );
        }
    }

    #[test]
    fn a_tensor_outside_the_file_is_refused() {
        assert!(matches!(
            Gguf::parse(&sample(), 200),
            Err(GgufError::Damaged(_))
        ));
        let huge = Writer::default()
            .tensor("w", &[u64::MAX, u64::MAX], 0, 0)
            .header();
        assert!(matches!(
            Gguf::parse(&huge, 1 << 20),
            Err(GgufError::Damaged(_))
        ));
        let odd = Writer::default().tensor("w", &[33], 3, 0).header();
        assert!(matches!(
            Gguf::parse(&odd, 1 << 20),
            Err(GgufError::Damaged(_))
        ));
    }

    #[test]
    fn a_tensor_without_elements_is_refused() {
        let empty = Writer::default()
            .tensor("w", &[32, 0, 1 << 40, 1 << 40], 0, 0)
            .header();
        assert!(matches!(
            Gguf::parse(&empty, 1 << 20),
            Err(GgufError::Damaged(_))
        ));
    }

    #[test]
    fn an_unknown_quantization_is_named() {
        let bytes = Writer::default().tensor("blk.0.w", &[256], 10, 0).header();
        let error = Gguf::parse(&bytes, 1 << 20).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("tensor blk.0.w: element type 10"),
            "{error}"
        );
    }

    proptest! {
        #[test]
        fn no_damage_makes_it_panic(changes in prop::collection::vec((0usize..300, any::<u8>()), 1..8), cut in 0usize..400) {
            let mut bytes = sample();
            for (at, value) in changes {
                let n = bytes.len();
                bytes[at % n] = value;
            }
            bytes.truncate(cut);
            let _ = Gguf::parse(&bytes, 4096);
        }
    }
}
