//! Named values: options handed to a plugin, and attributes it hands out.

use crate::api::{slice, string};
use crate::sys::{self, named_value};

/// The value of an option or attribute.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Text.
    String(String),
    /// An integer.
    Int64(i64),
    /// A list of integers.
    Int64List(Vec<i64>),
    /// A number.
    Float(f32),
    /// A fact.
    Bool(bool),
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::String(value.to_owned())
    }
}

impl From<i64> for Value {
    fn from(value: i64) -> Self {
        Self::Int64(value)
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<f32> for Value {
    fn from(value: f32) -> Self {
        Self::Float(value)
    }
}

/// Options in C form. Points into `options`, so it must not outlive them.
pub(crate) fn to_raw(options: &[(&str, Value)]) -> Vec<sys::NamedValue> {
    options
        .iter()
        .map(|(name, value)| one_to_raw(name, value))
        .collect()
}

fn one_to_raw(name: &str, value: &Value) -> sys::NamedValue {
    use sys::NamedValuePayload as Payload;
    let (kind, payload, value_size) = match value {
        Value::String(text) => (
            named_value::STRING,
            Payload {
                string: text.as_ptr().cast(),
            },
            text.len(),
        ),
        Value::Int64(int64) => (named_value::INT64, Payload { int64: *int64 }, 1),
        Value::Int64List(list) => (
            named_value::INT64_LIST,
            Payload {
                int64_list: list.as_ptr(),
            },
            list.len(),
        ),
        Value::Float(float) => (named_value::FLOAT, Payload { float: *float }, 1),
        Value::Bool(bool) => (named_value::BOOL, Payload { bool: *bool }, 1),
    };
    sys::NamedValue {
        name: name.as_ptr().cast(),
        name_size: name.len(),
        kind,
        payload,
        value_size,
        ..sys::NamedValue::new()
    }
}

/// Copies attributes; those of a kind added after this crate was written are left out.
///
/// # Safety
/// `values` is null or points to `len` valid named values.
pub(crate) unsafe fn from_raw(values: *const sys::NamedValue, len: usize) -> Vec<(String, Value)> {
    // SAFETY: passed on to the caller.
    let values = unsafe { slice(values, len) };
    // SAFETY: each is valid.
    values
        .iter()
        .filter_map(|value| unsafe { one_from_raw(value) })
        .collect()
}

/// # Safety
/// The pointers in `raw` and the active field of its payload are valid.
unsafe fn one_from_raw(raw: &sys::NamedValue) -> Option<(String, Value)> {
    // SAFETY: the plugin sets the field that `kind` names, and the sizes that go with the pointers.
    let value = unsafe {
        match raw.kind {
            named_value::STRING => Value::String(string(raw.payload.string, raw.value_size)),
            named_value::INT64 => Value::Int64(raw.payload.int64),
            named_value::INT64_LIST => {
                Value::Int64List(slice(raw.payload.int64_list, raw.value_size).to_vec())
            }
            named_value::FLOAT => Value::Float(raw.payload.float),
            named_value::BOOL => Value::Bool(raw.payload.bool),
            _ => return None,
        }
    };
    // SAFETY: as above.
    Some((unsafe { string(raw.name, raw.name_size) }, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_survive_the_way_into_c_and_back() {
        let options = [
            ("text", Value::from("v6e:2x4")),
            ("int", Value::from(-7)),
            ("list", Value::Int64List(vec![1, 2, 3])),
            ("float", Value::from(0.5_f32)),
            ("bool", Value::from(true)),
            ("empty", Value::from("")),
        ];
        let raw = to_raw(&options);
        // SAFETY: `raw` points into `options`, which is alive.
        let back = unsafe { from_raw(raw.as_ptr(), raw.len()) };
        for ((name, value), (back_name, back_value)) in options.iter().zip(&back) {
            assert_eq!((*name, value), (back_name.as_str(), back_value));
        }
        assert_eq!(back.len(), options.len());
    }
}
