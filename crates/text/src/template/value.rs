//! JSON as templates see it: lists, dictionaries and numbers that print as Python prints them.

use minijinja::value::{Enumerator, Object, ObjectRepr, Value, ValueKind};
use minijinja::{Error, Output, State};
use serde_json::Value as Json;
use std::collections::HashMap;
use std::fmt::{self, Write};
use std::sync::Arc;

/// Deeper values print as an ellipsis: printing takes stack. JSON that comes in is not that deep.
const MAX_DEPTH: usize = 130;

/// A value for templates.
pub(super) fn of_json(json: &Json) -> Value {
    match json {
        Json::Array(items) => Value::from_object(List(items.iter().map(of_json).collect())),
        Json::Object(entries) => {
            let index = entries.keys().cloned().zip(0..).collect();
            let entries = entries
                .iter()
                .map(|(key, value)| (Value::from(key.as_str()), of_json(value)));
            Value::from_object(Dict {
                entries: entries.collect(),
                index,
            })
        }
        plain => Value::from_serialize(plain),
    }
}

/// What `{{ value }}` writes.
pub(super) fn print(out: &mut Output<'_>, _: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Seq | ValueKind::Map | ValueKind::Number => write_repr(out, value, 0)?,
        _ => write!(out, "{value}")?,
    }
    Ok(())
}

#[derive(Debug)]
struct List(Vec<Value>);

impl Object for List {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.0.get(key.as_usize()?).cloned()
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(self.0.len())
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_repr(f, &Value::from_dyn_object(Arc::clone(self)), 0)
    }
}

#[derive(Debug)]
struct Dict {
    /// In the order of the text.
    entries: Vec<(Value, Value)>,
    index: HashMap<String, usize>,
}

impl Object for Dict {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Map
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let at = *self.index.get(key.as_str()?)?;
        self.entries.get(at).map(|(_, value)| value.clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.entries.iter().map(|(key, _)| key.clone()).collect())
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_repr(f, &Value::from_dyn_object(Arc::clone(self)), 0)
    }
}

/// Python's `repr`.
fn write_repr(out: &mut dyn Write, value: &Value, depth: usize) -> fmt::Result {
    if depth > MAX_DEPTH {
        return out.write_str("...");
    }
    match value.kind() {
        ValueKind::String => write_text(out, value.as_str().unwrap_or_default()),
        ValueKind::Number if !value.is_integer() => match f64::try_from(value.clone()) {
            Ok(number) if number.is_finite() => out.write_str(&float(number)),
            _ => write!(out, "{value}"),
        },
        ValueKind::Seq => {
            out.write_char('[')?;
            for (i, item) in items(value).enumerate() {
                out.write_str(if i == 0 { "" } else { ", " })?;
                write_repr(out, &item, depth + 1)?;
            }
            out.write_char(']')
        }
        ValueKind::Map => {
            out.write_char('{')?;
            for (i, key) in items(value).enumerate() {
                out.write_str(if i == 0 { "" } else { ", " })?;
                write_repr(out, &key, depth + 1)?;
                out.write_str(": ")?;
                write_repr(out, &value.get_item(&key).unwrap_or_default(), depth + 1)?;
            }
            out.write_char('}')
        }
        _ => write!(out, "{value}"),
    }
}

fn items(value: &Value) -> impl Iterator<Item = Value> {
    value.try_iter().into_iter().flatten()
}

/// In single quotes, unless double ones save escaping.
fn write_text(out: &mut dyn Write, text: &str) -> fmt::Result {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.write_char(quote)?;
    for c in text.chars() {
        match c {
            '\\' => out.write_str("\\\\")?,
            '\n' => out.write_str("\\n")?,
            '\r' => out.write_str("\\r")?,
            '\t' => out.write_str("\\t")?,
            c if c == quote => write!(out, "\\{c}")?,
            c if c.is_control() => write!(out, "\\x{:02x}", u32::from(c))?,
            c => out.write_char(c)?,
        }
    }
    out.write_char(quote)
}

/// Python's `repr` of a finite number: as few digits as tell it apart, an exponent below 1e-4 and from 1e16 on.
pub(super) fn float(value: f64) -> String {
    let scientific = format!("{value:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else {
        return scientific;
    };
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if value != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = value.to_string();
    if plain.contains('.') {
        plain
    } else {
        plain + ".0"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_print_as_in_python() {
        let value =
            of_json(&json!({"a": [1, 2.0, null, true, "it's", "\"", "'\"\n\u{1}é"], "b": {}}));
        let expected = r#"{'a': [1, 2.0, None, True, "it's", '"', '\'"\n\x01é'], 'b': {}}"#;
        assert_eq!(value.to_string(), expected);
    }

    #[test]
    fn dictionaries_keep_their_order_and_find_their_keys() {
        let value = of_json(&json!({"z": 1, "a": {"k": [7]}}));
        let keys: Vec<String> = items(&value).map(|key| key.to_string()).collect();
        assert_eq!(keys, ["z", "a"]);
        let inner = value.get_attr("a").unwrap().get_attr("k").unwrap();
        assert_eq!(inner.get_item(&Value::from(0)).unwrap(), Value::from(7));
        assert!(value.get_attr("x").unwrap().is_undefined());
    }

    #[test]
    fn a_value_without_end_is_cut() {
        let deep = (0..1000).fold(Value::from(1), |inner, _| Value::from(vec![inner]));
        let mut out = String::new();
        write_repr(&mut out, &deep, 0).unwrap();
        assert!(out.contains("...") && out.len() < 300);
    }

    #[test]
    fn floats_are_written_as_python_does() {
        let cases = [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e16, "1e+16"),
            (1e15, "1000000000000000.0"),
            (1.5e-5, "1.5e-05"),
            (0.0001, "0.0001"),
            (1e100, "1e+100"),
            (-2.5e-10, "-2.5e-10"),
            (123_456.789, "123456.789"),
        ];
        for (value, text) in cases {
            assert_eq!(float(value), text);
        }
    }
}
