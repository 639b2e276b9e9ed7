//! Reads objects field by field: what is unknown, or of the wrong kind, is noted with its place and the nearest name,
//! and what was read is written down with defaults filled in.

use serde_json::{Map, Value};
use std::fmt;
use std::time::Duration;

/// Something to say about a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Where, such as `plugins[3].parameters.threshold`; empty for the whole.
    pub place: String,
    /// What.
    pub text: String,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.place.as_str() {
            "" => f.write_str(&self.text),
            place => write!(f, "{place}: {}", self.text),
        }
    }
}

/// What was found wrong, and what is merely worth saying.
#[derive(Debug, Default)]
pub(super) struct Notes {
    pub(super) errors: Vec<Note>,
    pub(super) warnings: Vec<Note>,
}

impl Notes {
    pub(super) fn wrong(&mut self, place: impl Into<String>, text: impl Into<String>) {
        let (place, text) = (place.into(), text.into());
        self.errors.push(Note { place, text });
    }

    pub(super) fn warn(&mut self, place: impl Into<String>, text: impl Into<String>) {
        let (place, text) = (place.into(), text.into());
        self.warnings.push(Note { place, text });
    }
}

/// An object being read. Fields that are `null` count as left out.
pub(super) struct Fields<'a, 'n> {
    object: Option<&'a Map<String, Value>>,
    pub(super) place: String,
    known: Vec<&'static str>,
    said: Map<String, Value>,
    pub(super) notes: &'n mut Notes,
}

/// Reads the object `value` with `read`; returns what that returns, and the object with its defaults.
pub(super) fn object<'a, T>(
    value: Option<&'a Value>,
    place: String,
    notes: &mut Notes,
    read: impl FnOnce(&mut Fields<'a, '_>) -> T,
) -> (T, Value) {
    let object = match value {
        None | Some(Value::Null) => None,
        Some(Value::Object(object)) => Some(object),
        Some(other) => {
            notes.wrong(&*place, format!("this is {}, not an object", kind(other)));
            None
        }
    };
    let mut fields = Fields {
        object,
        place,
        known: Vec::new(),
        said: Map::new(),
        notes,
    };
    let result = read(&mut fields);
    fields.refuse_unknown();
    (result, Value::Object(fields.said))
}

impl<'a> Fields<'a, '_> {
    /// The place of a field.
    pub(super) fn at(&self, key: &str) -> String {
        match self.place.as_str() {
            "" => key.to_owned(),
            place => format!("{place}.{key}"),
        }
    }

    /// A field as it is.
    pub(super) fn raw(&mut self, key: &'static str) -> Option<&'a Value> {
        self.known.push(key);
        self.object?.get(key).filter(|v| !v.is_null())
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.object
            .and_then(|o| o.get(key))
            .is_some_and(|v| !v.is_null())
    }

    /// Writes down what a field is taken for.
    pub(super) fn say(&mut self, key: &str, value: impl Into<Value>) {
        self.said.insert(key.to_owned(), value.into());
    }

    /// Takes that back: another field says it.
    pub(super) fn unsay(&mut self, key: &str) {
        self.said.remove(key);
    }

    pub(super) fn wrong(&mut self, key: &str, text: impl Into<String>) {
        let place = self.at(key);
        self.notes.wrong(place, text);
    }

    pub(super) fn warn(&mut self, key: &str, text: impl Into<String>) {
        let place = self.at(key);
        self.notes.warn(place, text);
    }

    /// A field that is accepted and does nothing.
    pub(super) fn ignored(&mut self, key: &'static str, why: &str) {
        if self.raw(key).is_some() {
            self.warn(key, format!("has no effect: {why}"));
        }
    }

    pub(super) fn flag(&mut self, key: &'static str, default: bool) -> bool {
        let flag = match self.raw(key) {
            None => default,
            Some(Value::Bool(flag)) => *flag,
            Some(other) => {
                self.wrong(key, format!("this is {}, not true or false", kind(other)));
                default
            }
        };
        self.say(key, flag);
        flag
    }

    /// A number from `least` to `most`.
    pub(super) fn number(
        &mut self,
        key: &'static str,
        default: f64,
        (least, most): (f64, f64),
    ) -> f64 {
        let number = match self.raw(key).map(|v| (v, v.as_f64())) {
            None => default,
            Some((_, Some(n))) if (least..=most).contains(&n) => n,
            Some((_, Some(n))) => {
                self.wrong(key, format!("{n} is not from {least} to {most}"));
                default
            }
            Some((other, None)) => {
                self.wrong(key, format!("this is {}, not a number", kind(other)));
                default
            }
        };
        self.say(key, number);
        number
    }

    /// A whole number from `least` to `most`, if it is there.
    pub(super) fn whole_if(&mut self, key: &'static str, (least, most): (i64, i64)) -> Option<i64> {
        let value = self.raw(key)?;
        let Some(n) = value.as_i64().or_else(|| whole_float(value)) else {
            self.wrong(key, format!("this is {}, not a whole number", kind(value)));
            return None;
        };
        if !(least..=most).contains(&n) {
            self.wrong(key, format!("{n} is not from {least} to {most}"));
            return None;
        }
        self.say(key, n);
        Some(n)
    }

    /// A count from `least` to 4,294,967,295.
    pub(super) fn count(&mut self, key: &'static str, default: u32, least: u32) -> u32 {
        let bounds = (least.into(), u32::MAX.into());
        let n = self.whole_if(key, bounds);
        let n = n.and_then(|n| u32::try_from(n).ok()).unwrap_or(default);
        self.say(key, n);
        n
    }

    pub(super) fn port(&mut self, key: &'static str) -> Option<u16> {
        self.whole_if(key, (0, u16::MAX.into()))
            .and_then(|n| u16::try_from(n).ok())
            .filter(|n| *n != 0)
    }

    pub(super) fn text_if(&mut self, key: &'static str) -> Option<&'a str> {
        match self.raw(key)? {
            Value::String(text) => {
                self.say(key, text.as_str());
                Some(text)
            }
            other => {
                self.wrong(key, format!("this is {}, not a string", kind(other)));
                None
            }
        }
    }

    pub(super) fn text(&mut self, key: &'static str, default: &str) -> Box<str> {
        let text: Box<str> = self.text_if(key).unwrap_or(default).into();
        self.say(key, &*text);
        text
    }

    /// One of some words.
    pub(super) fn choice<T: Copy>(&mut self, key: &'static str, words: &[(&str, T)]) -> T {
        let word = self.text_if(key);
        let found = match word {
            None => words.first(),
            Some(word) => words.iter().find(|(w, _)| *w == word),
        };
        if let (Some(word), None) = (word, found) {
            let all: Vec<&str> = words.iter().map(|(w, _)| *w).collect();
            self.wrong(key, format!("{word:?} is none of {}", all.join(", ")));
        }
        // The words are constants, and there are some.
        let (word, meaning) = found.unwrap_or(&words[0]);
        self.say(key, *word);
        *meaning
    }

    /// A length of time, such as `1m30s`.
    pub(super) fn duration_if(&mut self, key: &'static str) -> Option<Duration> {
        let value = self.raw(key)?;
        let read = match value {
            Value::String(text) => duration(text),
            Value::Number(n) if n.as_u64() == Some(0) => Some(Duration::ZERO),
            _ => None,
        };
        if read.is_none() {
            self.wrong(key, "this is no length of time, such as 200ms or 1m30s");
        }
        self.say(key, value.clone());
        read
    }

    pub(super) fn duration(&mut self, key: &'static str, default: Duration) -> Duration {
        let length = self.duration_if(key).unwrap_or(default);
        let text = match length.subsec_nanos() % 1_000_000 {
            0 => format!("{}ms", length.as_millis()),
            _ => format!("{}ns", length.as_nanos()),
        };
        self.say(key, text);
        length
    }

    /// A Kubernetes quantity, such as `10Mi`, in whole units.
    pub(super) fn quantity_if(&mut self, key: &'static str) -> Option<u64> {
        let value = self.raw(key)?;
        let read = match value {
            Value::String(text) => quantity(text),
            Value::Number(n) => n.as_u64(),
            _ => None,
        };
        match read {
            Some(n) => self.say(key, n.to_string()),
            None => self.wrong(key, "this is no quantity, such as 2000 or 10Mi"),
        }
        read
    }

    pub(super) fn texts(&mut self, key: &'static str) -> Vec<&'a str> {
        let Some(value) = self.raw(key) else {
            return Vec::new();
        };
        let list = value
            .as_array()
            .map(|list| (list.iter().map(Value::as_str)).collect::<Option<Vec<&str>>>());
        let Some(Some(list)) = list else {
            self.wrong(key, "this is no list of strings");
            return Vec::new();
        };
        self.say(key, list.clone());
        list
    }

    /// An object inside this one.
    pub(super) fn inside<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&mut Fields<'a, '_>) -> T,
    ) -> T {
        let (value, place) = (self.raw(key), self.at(key));
        let (result, said) = object(value, place, self.notes, read);
        if said.as_object().is_some_and(|o| !o.is_empty()) {
            self.say(key, said);
        }
        result
    }

    /// A list of objects.
    pub(super) fn each<T>(
        &mut self,
        key: &'static str,
        mut read: impl FnMut(&mut Fields<'a, '_>) -> T,
    ) -> Vec<T> {
        let place = self.at(key);
        let list = match self.raw(key) {
            None => return Vec::new(),
            Some(Value::Array(list)) => list,
            Some(other) => {
                self.wrong(key, format!("this is {}, not a list", kind(other)));
                return Vec::new();
            }
        };
        let read = |(i, value)| object(Some(value), format!("{place}[{i}]"), self.notes, &mut read);
        let (results, said): (Vec<T>, Vec<Value>) = list.iter().enumerate().map(read).unzip();
        self.say(key, said);
        results
    }

    fn refuse_unknown(&mut self) {
        for key in self.object.into_iter().flat_map(Map::keys) {
            if !self.known.iter().any(|k| k == key) {
                let hint = did_you_mean(key, self.known.iter().copied());
                self.wrong(key, format!("there is no such field{hint}"));
            }
        }
    }
}

/// What a value is, for people.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// 3.0 for 3: YAML written by programs has it.
fn whole_float(value: &Value) -> Option<i64> {
    let n = value.as_f64().filter(|n| n.fract() == 0.0)?;
    // Whole numbers below 2^53 are exact.
    (n.abs() < 9e15).then_some(n as i64)
}

/// A length of time as Go writes it: numbers with units, one after another, such as `1m30s`. `None` if it is none.
#[must_use]
pub fn duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let (mut rest, mut seconds) = (text, 0.0);
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..end].parse().ok()?;
        rest = &rest[end..];
        let end = rest
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(rest.len());
        let unit = match &rest[..end] {
            "ns" => 1e-9,
            "us" | "µs" | "μs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        seconds += number * unit;
        rest = &rest[end..];
    }
    let some = !text.is_empty();
    // A century is as good as for ever, and does not overflow.
    Duration::try_from_secs_f64(seconds.min(3.2e9))
        .ok()
        .filter(|_| some)
}

/// A number with one of Kubernetes' suffixes, such as `10Mi`; a `B` after it is tolerated. `None` if it is none.
#[must_use]
pub fn quantity(text: &str) -> Option<u64> {
    let text = text.strip_suffix('B').unwrap_or(text);
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let number: f64 = text[..end].parse().ok()?;
    let factor = match &text[end..] {
        "" => 1.0,
        "m" => 1e-3,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "Ki" => f64::from(1 << 10),
        "Mi" => f64::from(1 << 20),
        "Gi" => f64::from(1 << 30),
        "Ti" => (1u64 << 40) as f64,
        _ => return None,
    };
    let value = number * factor;
    (value < 1.8e19).then_some(value.ceil() as u64)
}

/// A hint at the known name that is nearest to `name`, if one is near.
pub(super) fn did_you_mean<'k>(name: &str, known: impl Iterator<Item = &'k str>) -> String {
    // Long names are no slips of the pen, and comparing them takes time.
    let nearest = known
        .filter(|_| name.len() <= 64)
        .map(|k| (distance(&name.to_lowercase(), &k.to_lowercase()), k))
        .min();
    match nearest {
        Some((d, k)) if d <= (k.len() / 3).max(1) => format!("; is it {k}?"),
        _ => String::new(),
    }
}

/// Letters to insert, remove or exchange.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.chars().enumerate() {
            let exchange = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = exchange.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time_are_written_as_in_go() {
        let ms = |n| Some(Duration::from_millis(n));
        let cases = [
            ("200ms", ms(200)),
            ("1m30s", ms(90_000)),
            ("1.5s", ms(1500)),
            ("0s", ms(0)),
            ("0", ms(0)),
            ("2h", ms(7_200_000)),
            ("", None),
            ("5", None),
            ("s", None),
            ("-1s", None),
            ("1x", None),
            ("1..5s", None),
        ];
        for (text, expected) in cases {
            assert_eq!(duration(text), expected, "{text:?}");
        }
    }

    #[test]
    fn quantities_are_written_as_in_kubernetes() {
        let cases = [
            ("2000", Some(2000)),
            ("10Mi", Some(10 << 20)),
            ("2GiB", Some(2 << 30)),
            ("1.5k", Some(1500)),
            ("100m", Some(1)),
            ("", None),
            ("Mi", None),
            ("-1", None),
            ("9999999999Ti", None),
        ];
        for (text, expected) in cases {
            assert_eq!(quantity(text), expected, "{text:?}");
        }
    }

    #[test]
    fn the_nearest_name_is_told_if_it_is_near() {
        let known = ["blockSizeTokens", "autoTune"];
        let hint = |name| did_you_mean(name, known.iter().copied());
        assert_eq!(hint("blockSizetoken"), "; is it blockSizeTokens?");
        assert_eq!(hint("autotune"), "; is it autoTune?");
        assert_eq!(hint("weight"), "");
        assert_eq!(hint(&"a".repeat(1000)), "");
    }
}
