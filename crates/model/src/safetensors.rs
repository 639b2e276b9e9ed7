//! The header of a safetensors file: names, types, shapes and places of tensors. Takes bytes; reads no tensor.

use crate::quant::Storage;
use rustc_hash::FxHashMap;
use serde::Deserialize;

/// A header longer than this is refused, as the format's own library does.
pub const MAX_HEADER: u64 = 100_000_000;
/// Bytes before the header: its length.
pub const PREFIX: usize = 8;

/// Where a tensor lies in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SafeTensor {
    /// Sizes, fastest last.
    pub shape: Vec<usize>,
    /// F32, F16 or BF16.
    pub storage: Storage,
    /// Place of its first byte in the file.
    pub offset: u64,
    /// Its bytes.
    pub n_bytes: usize,
}

/// Why a header cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SafetensorsError {
    /// Its length cannot be right.
    #[error("the safetensors header says it has {0} bytes")]
    Length(u64),
    /// Not the JSON it should be.
    #[error("safetensors header: {0}")]
    Json(#[from] serde_json::Error),
    /// A tensor whose place or size contradicts the file's.
    #[error("safetensors: tensor {0} lies outside the file or contradicts its shape")]
    Place(String),
}

#[derive(Deserialize)]
struct Raw {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// The header's length, from a file's first eight bytes.
pub fn header_len(prefix: [u8; PREFIX], file_len: u64) -> Result<usize, SafetensorsError> {
    let n = u64::from_le_bytes(prefix);
    if n > MAX_HEADER
        || n.checked_add(PREFIX as u64)
            .is_none_or(|end| end > file_len)
    {
        return Err(SafetensorsError::Length(n));
    }
    usize::try_from(n).map_err(|_| SafetensorsError::Length(n))
}

/// The tensors of a file. Types other than F32, F16 and BF16 are left out: a model that needs one lacks it then by name.
pub fn parse_header(
    header: &[u8],
    file_len: u64,
) -> Result<FxHashMap<String, SafeTensor>, SafetensorsError> {
    let mut raw: FxHashMap<String, serde_json::Value> = serde_json::from_slice(header)?;
    raw.remove("__metadata__");
    let data = (PREFIX + header.len()) as u64;
    let mut tensors = FxHashMap::default();
    for (name, value) in raw {
        let raw: Raw = serde_json::from_value(value)?;
        let storage = match raw.dtype.as_str() {
            "F32" => Storage::F32,
            "F16" => Storage::F16,
            "BF16" => Storage::BF16,
            _ => continue,
        };
        let (start, end) = raw.data_offsets;
        let elements = raw
            .shape
            .iter()
            .try_fold(1usize, |n, &size| n.checked_mul(size));
        let n_bytes = elements.and_then(|n| storage.bytes_of(n));
        let fits = data.checked_add(end).is_some_and(|end| end <= file_len);
        match n_bytes {
            Some(n) if fits && end.checked_sub(start) == Some(n as u64) => {
                let tensor = SafeTensor {
                    shape: raw.shape,
                    storage,
                    offset: data + start,
                    n_bytes: n,
                };
                tensors.insert(name, tensor);
            }
            _ => return Err(SafetensorsError::Place(name)),
        }
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEADER: &str = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},
        "b":{"dtype":"I64","shape":[1],"data_offsets":[16,24]}}"#;

    #[test]
    fn tensors_lie_behind_the_header() {
        let tensors = parse_header(HEADER.as_bytes(), 1000).unwrap();
        assert_eq!(tensors.len(), 1);
        let a = &tensors["a"];
        assert_eq!(
            (a.shape.as_slice(), a.n_bytes, a.offset),
            ([2, 3].as_slice(), 12, 8 + HEADER.len() as u64 + 4)
        );
    }

    #[test]
    fn contradictions_are_refused() {
        assert!(parse_header(HEADER.as_bytes(), 20).is_err());
        assert!(parse_header(HEADER.replace("[2,3]", "[2,4]").as_bytes(), 1000).is_err());
        assert!(parse_header(HEADER.replace("[4,16]", "[16,4]").as_bytes(), 1000).is_err());
        assert!(header_len(u64::MAX.to_le_bytes(), 1000).is_err());
        assert!(header_len(993u64.to_le_bytes(), 1000).is_err());
        assert_eq!(header_len(992u64.to_le_bytes(), 1000).unwrap(), 992);
    }

    proptest! {
        #[test]
        fn no_damage_makes_it_panic(changes in prop::collection::vec((0usize..200, any::<u8>()), 1..6)) {
            let mut bytes = HEADER.as_bytes().to_vec();
            for (at, value) in changes {
                let n = bytes.len();
                bytes[at % n] = value;
            }
            let _ = parse_header(&bytes, 500);
        }
    }
}
