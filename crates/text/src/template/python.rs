//! What templates expect of Python: `tojson` as `json.dumps` writes, `strftime_now` without a clock, `raise_exception`,
//! and the `generation` blocks of Hugging Face.

use super::value::float;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind};
use serde::Serialize as _;
use serde_json::ser::{CharEscape, Formatter, Serializer};
use std::io;

/// The template refused the conversation; rides in the error that ends the rendering.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub(super) String);

/// `raise_exception(message)`.
#[expect(
    clippy::needless_pass_by_value,
    reason = "minijinja hands functions their arguments by value"
)]
pub(super) fn raise_exception(message: Value) -> Result<Value, Error> {
    let message = message.to_string();
    Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(message)))
}

/// What Python's `iter` takes: texts too, null not.
pub(super) fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// What has a length and items by key: texts and mappings too.
pub(super) fn is_sequence(value: &Value) -> bool {
    matches!(
        value.kind(),
        ValueKind::Seq | ValueKind::String | ValueKind::Map
    )
}

/// `{% generation %}` marks what the model said; to us it is a block with variables of its own.
pub(super) fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, tag)) = rest.split_once("{%") {
        out.push_str(before);
        out.push_str("{%");
        let body = tag.trim_start_matches(['-', '+']).trim_start();
        let word = body
            .split(|c: char| !c.is_alphanumeric() && c != '_')
            .next()
            .unwrap_or_default();
        let ours = match word {
            "generation" => "with",
            "endgeneration" => "endwith",
            _ => word,
        };
        let (space, body) = (&tag[..tag.len() - body.len()], &body[word.len()..]);
        out.push_str(space);
        out.push_str(ours);
        rest = body;
    }
    out.push_str(rest);
    out
}

/// `json.dumps(value, ensure_ascii=…, indent=…, separators=…, sort_keys=…)`, not escaped for HTML.
#[expect(
    clippy::needless_pass_by_value,
    reason = "minijinja hands filters their keyword arguments by value"
)]
pub(super) fn to_json(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let bad = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    let style = JsonStyle::of(&kwargs)?;
    let sorted = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    kwargs.assert_all_used()?;
    let mut out = Vec::new();
    let mut serializer = Serializer::with_formatter(&mut out, style);
    if sorted {
        let mut value = serde_json::to_value(value).map_err(bad)?;
        value.sort_all_objects();
        value.serialize(&mut serializer).map_err(bad)?;
    } else {
        value.serialize(&mut serializer).map_err(bad)?;
    }
    Ok(Value::from_safe_string(
        String::from_utf8_lossy(&out).into_owned(),
    ))
}

/// How `json.dumps` lays a value out.
struct JsonStyle {
    between_items: String,
    after_key: String,
    /// Spaces a level; none: all on one line.
    indent: Option<usize>,
    is_ascii: bool,
    depth: usize,
    is_empty: bool,
}

impl JsonStyle {
    /// Deeper indents than anyone reads would only cost memory.
    const MAX_INDENT: usize = 16;

    fn of(kwargs: &Kwargs) -> Result<Self, Error> {
        let indent = kwargs
            .get::<Option<usize>>("indent")?
            .map(|n| n.min(Self::MAX_INDENT));
        let separators: Option<Vec<String>> = kwargs.get("separators")?;
        let (between_items, after_key) = match separators.as_deref() {
            Some([items, keys]) => (items.clone(), keys.clone()),
            Some(_) => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    "separators are two texts",
                ));
            }
            None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
            None => (", ".to_owned(), ": ".to_owned()),
        };
        let is_ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
        Ok(Self {
            between_items,
            after_key,
            indent,
            is_ascii,
            depth: 0,
            is_empty: true,
        })
    }

    fn open<W: ?Sized + io::Write>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.is_empty = true;
        out.write_all(bracket)
    }

    fn close<W: ?Sized + io::Write>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if !self.is_empty {
            self.line(out)?;
        }
        self.is_empty = false;
        out.write_all(bracket)
    }

    fn item<W: ?Sized + io::Write>(&mut self, out: &mut W, is_first: bool) -> io::Result<()> {
        if !is_first {
            out.write_all(self.between_items.as_bytes())?;
        }
        self.is_empty = false;
        self.line(out)
    }

    fn line<W: ?Sized + io::Write>(&self, out: &mut W) -> io::Result<()> {
        let Some(indent) = self.indent else {
            return Ok(());
        };
        out.write_all(b"\n")?;
        (0..self.depth * indent).try_for_each(|_| out.write_all(b" "))
    }
}

impl Formatter for JsonStyle {
    fn begin_array<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"[")
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"]")
    }

    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.item(out, first)
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"{")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"}")
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.item(out, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(self.after_key.as_bytes())
    }

    fn write_f64<W: ?Sized + io::Write>(&mut self, out: &mut W, value: f64) -> io::Result<()> {
        out.write_all(float(value).as_bytes())
    }

    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        out: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        if !self.is_ascii {
            return out.write_all(fragment.as_bytes());
        }
        for c in fragment.chars() {
            if matches!(c, ' '..='~') {
                out.write_all(&[c as u8])?;
            } else {
                c.encode_utf16(&mut [0; 2])
                    .iter()
                    .try_for_each(|unit| write!(out, "\\u{unit:04x}"))?;
            }
        }
        Ok(())
    }

    fn write_char_escape<W: ?Sized + io::Write>(
        &mut self,
        out: &mut W,
        escape: CharEscape,
    ) -> io::Result<()> {
        serde_json::ser::CompactFormatter.write_char_escape(out, escape)
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = [
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
];

/// A day of the calendar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Day {
    year: u32,
    /// From 1.
    month: u32,
    /// From 1.
    day: u32,
}

impl Day {
    /// From `26 Nov 2025` or `2025-11-26`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let by_spaces: Vec<&str> = text.split(' ').collect();
        let (year, month, day) = if let [day, month, year] = by_spaces[..] {
            let known = MONTHS
                .iter()
                .position(|name| name.get(..3) == Some(month))?;
            (
                year.parse().ok()?,
                u32::try_from(known).ok()? + 1,
                day.parse().ok()?,
            )
        } else {
            let mut parts = text.splitn(3, '-').map(str::parse);
            (
                parts.next()?.ok()?,
                parts.next()?.ok()?,
                parts.next()?.ok()?,
            )
        };
        let is_real =
            (1..=9999).contains(&year) && (1..=12).contains(&month) && (1..=31).contains(&day);
        is_real.then_some(Self { year, month, day })
    }

    /// As Python's `strftime` writes it; it is always midnight. What we do not know stays as it is.
    pub(super) fn format(self, format: &str) -> String {
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            match chars.next() {
                Some('-') => self.field(chars.next(), Pad::No, &mut out),
                letter => self.field(letter, Pad::Zeros, &mut out),
            }
        }
        out
    }

    fn field(self, letter: Option<char>, pad: Pad, out: &mut String) {
        let number = |n: u32, width: usize| match pad {
            Pad::Zeros => format!("{n:0width$}"),
            Pad::No => n.to_string(),
        };
        let month = MONTHS[(self.month - 1) as usize % 12];
        let weekday = WEEKDAYS[self.weekday()];
        let text = match letter {
            Some('Y') => self.year.to_string(),
            Some('y') => number(self.year % 100, 2),
            Some('m') => number(self.month, 2),
            Some('d') => number(self.day, 2),
            Some('j') => number(self.day_of_year(), 3),
            Some('H' | 'M' | 'S') => number(0, 2),
            Some('B') => month.to_owned(),
            Some('b') => month[..3].to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('%') => "%".to_owned(),
            Some(other) => format!("%{other}"),
            None => "%".to_owned(),
        };
        out.push_str(&text);
    }

    /// From 1.
    fn day_of_year(self) -> u32 {
        let is_leap = self.year.is_multiple_of(4)
            && (!self.year.is_multiple_of(100) || self.year.is_multiple_of(400));
        let before =
            [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334][(self.month - 1) as usize % 12];
        before + self.day + u32::from(is_leap && self.month > 2)
    }

    /// From Monday, 0. The first of January of the year 1 was one.
    fn weekday(self) -> usize {
        let years = self.year - 1;
        let days = years * 365 + years / 4 - years / 100 + years / 400 + self.day_of_year() - 1;
        (days % 7) as usize
    }
}

#[derive(Clone, Copy)]
enum Pad {
    Zeros,
    No,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_written_in_every_common_form() {
        let day = Day::parse("03 Feb 2024").unwrap();
        assert_eq!(Some(day), Day::parse("2024-02-03"));
        assert_eq!(day.format("%d %b %Y"), "03 Feb 2024");
        assert_eq!(
            day.format("%A, %B %-d, %y (%j) %H:%M %% %Q %"),
            "Saturday, February 3, 24 (034) 00:00 % %Q %"
        );
        let end = Day::parse("31 Dec 2024").unwrap();
        assert_eq!(end.format("%a %j"), "Tue 366");
    }

    #[test]
    fn what_is_no_day_is_refused() {
        for text in [
            "",
            "today",
            "3 Foo 2024",
            "2024-13-01",
            "2024-00-01",
            "0-1-1",
            "99999-01-01",
            "1 Jan 99999999999",
        ] {
            assert_eq!(Day::parse(text), None, "{text}");
        }
    }

    #[test]
    fn generation_tags_become_plain_blocks() {
        let source =
            "{%- generation -%}a{% endgeneration %}{% if generation %}{{ '{%' }}{% endif %}";
        let expected = "{%- with -%}a{% endwith %}{% if generation %}{{ '{%' }}{% endif %}";
        assert_eq!(without_generation_tags(source), expected);
        assert_eq!(without_generation_tags("{%"), "{%");
    }
}
