//! Edits of a JSON object that leave every byte they do not mean: order, spacing, spelling of numbers.
//!
//! An object is scanned once for where the known fields lie; an edit is then a list of cuts, and its result shares the
//! original's bytes. Only what is strictly JSON is edited: a server that reads more leniently could otherwise find in
//! the text what we did not. Not here: what is to be edited.

use crate::field::{Field, Name};
use baton_http::Pieces;
use bytes::Bytes;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::fmt;
use std::ops::Range;

/// Most occurrences of known fields in one object; there are some thirty of them.
const MAX_KNOWN: usize = 256;

/// A text is not exactly one JSON object.
#[derive(Debug, thiserror::Error)]
#[error("invalid JSON: {0}")]
pub(crate) struct NotAnObject(#[from] serde_json::Error);

/// A JSON object, and where in it the known fields are.
#[derive(Clone, Debug)]
pub(crate) struct Object {
    text: Bytes,
    known: Vec<Member>,
    /// Members, known or not.
    count: usize,
    /// Where the closing brace is.
    close: usize,
}

/// One occurrence of a known field.
#[derive(Clone, Debug)]
struct Member {
    field: Field,
    /// From behind the brace or comma before it to the comma or brace after it.
    whole: Range<usize>,
    value: Range<usize>,
}

impl Object {
    /// Scans `text`.
    pub(crate) fn parse(text: Bytes) -> Result<Self, NotAnObject> {
        let scan: Scan<'_> = serde_json::from_slice(&text)?;
        let span = |value: &RawValue| {
            let start = value.get().as_ptr().addr() - text.as_ptr().addr();
            start..start + value.get().len()
        };
        let open = skip_blank(&text, 0);
        let known = scan.known.iter().map(|found| {
            let value = span(found.value);
            let before = found
                .before
                .map_or(open, |v| skip_blank(&text, span(v).end));
            Member {
                field: found.field,
                whole: before + 1..skip_blank(&text, value.end),
                value,
            }
        });
        let known = known.collect();
        let end = scan.last.map_or(open + 1, |v| span(v).end);
        Ok(Self {
            known,
            count: scan.count,
            close: skip_blank(&text, end),
            text,
        })
    }

    /// The text as it was.
    pub(crate) fn text(&self) -> &Bytes {
        &self.text
    }

    /// The value of `field`; of a repeated field the last, as Python takes it.
    pub(crate) fn value(&self, field: Field) -> Option<Bytes> {
        let member = self.known.iter().rfind(|m| m.field == field)?;
        Some(self.text.slice(member.value.clone()))
    }

    /// As [`Self::value`], but nothing for `null`.
    pub(crate) fn given(&self, field: Field) -> Option<Bytes> {
        self.value(field).filter(|value| value != "null")
    }

    pub(crate) fn has(&self, field: Field) -> bool {
        self.known.iter().any(|m| m.field == field)
    }

    /// The object that `field` holds, if it holds one.
    pub(crate) fn object(&self, field: Field) -> Option<Self> {
        Self::parse(self.value(field)?).ok()
    }
}

/// The first byte from `at` on that is no white space.
fn skip_blank(text: &[u8], at: usize) -> usize {
    let blank = |b: &&u8| matches!(b, b' ' | b'\t' | b'\n' | b'\r');
    at + text[at..].iter().take_while(blank).count()
}

struct Found<'a> {
    field: Field,
    value: &'a RawValue,
    /// The value of the member before it.
    before: Option<&'a RawValue>,
}

#[derive(Default)]
struct Scan<'a> {
    known: Vec<Found<'a>>,
    count: usize,
    last: Option<&'a RawValue>,
}

impl<'de> Deserialize<'de> for Scan<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Scan<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Scan<'de>, A::Error> {
                let mut scan = Scan::default();
                while let Some(Name(name)) = map.next_key()? {
                    let value: &RawValue = map.next_value()?;
                    let before = scan.last.replace(value);
                    scan.count += 1;
                    let Some(field) = name else { continue };
                    if scan.known.len() == MAX_KNOWN {
                        return Err(A::Error::custom("too many repeated fields"));
                    }
                    scan.known.push(Found {
                        field,
                        value,
                        before,
                    });
                }
                Ok(scan)
            }
        }
        deserializer.deserialize_map(Members)
    }
}

/// What becomes of a field.
#[derive(Clone, Debug)]
enum Change {
    Remove,
    Set(Pieces),
}

/// Changes to an object. A later change of a field replaces an earlier one.
#[derive(Clone, Debug)]
pub(crate) struct Edit<'a> {
    object: &'a Object,
    changes: Vec<(Field, Change)>,
}

impl<'a> Edit<'a> {
    /// No change yet.
    pub(crate) fn of(object: &'a Object) -> Self {
        Self {
            object,
            changes: Vec::new(),
        }
    }

    /// The object as it was before this edit.
    pub(crate) fn object(&self) -> &'a Object {
        self.object
    }

    /// Gives `field` the JSON text `value`, in its place or at the end. Of a repeated field one remains.
    #[must_use]
    pub(crate) fn set(self, field: Field, value: impl Into<Pieces>) -> Self {
        self.change(field, Change::Set(value.into()))
    }

    /// Takes `field` out, however often it is there.
    #[must_use]
    pub(crate) fn remove(self, field: Field) -> Self {
        self.change(field, Change::Remove)
    }

    fn change(mut self, field: Field, change: Change) -> Self {
        self.changes.retain(|(of, _)| *of != field);
        self.changes.push((field, change));
        self
    }

    /// The edited text.
    pub(crate) fn finish(self) -> Pieces {
        let Object { text, known, .. } = self.object;
        let mut cuts: Vec<(Range<usize>, Pieces)> = Vec::new();
        let mut removed = 0;
        let mut added = Vec::new();
        for (field, change) in self.changes {
            let mut members = known.iter().filter(|m| m.field == field);
            match (change, members.next_back()) {
                (Change::Set(value), Some(last)) => cuts.push((last.value.clone(), value)),
                (Change::Set(value), None) => added.push((field, value)),
                (Change::Remove, Some(last)) => {
                    removed += 1;
                    cuts.push((last.whole.clone(), Pieces::default()));
                }
                (Change::Remove, None) => {}
            }
            for repeated in members {
                removed += 1;
                cuts.push((repeated.whole.clone(), Pieces::default()));
            }
        }
        let cuts = with_commas(text, self.object.close, cuts);
        let mut out = Pieces::default();
        let mut copied = 0;
        for (range, value) in cuts {
            out.push(text.slice(copied..range.start));
            out.append(value);
            copied = range.end;
        }
        out.push(text.slice(copied..self.object.close));
        let mut first = self.object.count == removed;
        for (field, value) in added {
            let comma = if first { "" } else { "," };
            out.push(format!("{comma}\"{}\":", field.name()));
            out.append(value);
            first = false;
        }
        out.push(text.slice(self.object.close..));
        out
    }
}

/// Widens cuts of whole members by one comma each, the one after it, or before it at the end of the object; in order.
fn with_commas(
    text: &[u8],
    close: usize,
    mut cuts: Vec<(Range<usize>, Pieces)>,
) -> Vec<(Range<usize>, Pieces)> {
    cuts.sort_by_key(|(range, _)| range.start);
    let mut out: Vec<(Range<usize>, Pieces)> = Vec::with_capacity(cuts.len());
    for (mut range, value) in cuts {
        if !value.is_empty() {
            out.push((range, value));
            continue;
        }
        let last = range.end == close;
        if !last {
            range.end += 1;
        }
        match out.last_mut() {
            Some((before, nothing)) if nothing.is_empty() && before.end == range.start => {
                before.end = range.end;
            }
            _ => out.push((range, value)),
        }
        if let (true, Some((range, _))) = (last, out.last_mut())
            && text.get(range.start.wrapping_sub(1)) == Some(&b',')
        {
            range.start -= 1;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn object(text: &str) -> Object {
        Object::parse(Bytes::copy_from_slice(text.as_bytes())).unwrap()
    }

    fn text(pieces: Pieces) -> String {
        String::from_utf8(pieces.into_bytes().to_vec()).unwrap()
    }

    #[test]
    fn a_set_field_stays_in_its_place_and_a_new_one_goes_to_the_end() {
        let object = object("{ \"stream\" : true , \"x\":1e400\n}");
        let edit = Edit::of(&object)
            .set(Field::Stream, "false")
            .set(Field::MaxTokens, "1");
        assert_eq!(
            text(edit.finish()),
            "{ \"stream\" : false , \"x\":1e400\n,\"max_tokens\":1}"
        );
    }

    #[test]
    fn removed_fields_take_one_comma_each_with_them() {
        for (before, after) in [
            (r#"{"n":1,"x":2}"#, r#"{"x":2}"#),
            (r#"{"x":2,"n":1}"#, r#"{"x":2}"#),
            (r#"{"x":2,"n":1,"y":3}"#, r#"{"x":2,"y":3}"#),
            (r#"{"x":2 , "n":1, "echo":3 }"#, r#"{"x":2 }"#),
            (r#"{"n":1,"echo":3,"n":2}"#, r"{}"),
            (r#"{"n":1,"x":0,"echo":3,"n":2}"#, r#"{"x":0}"#),
            (r#"{ "n" : 1 }"#, r"{}"),
            (r"{ }", r"{ }"),
        ] {
            let object = object(before);
            let edit = Edit::of(&object).remove(Field::N).remove(Field::Echo);
            assert_eq!(text(edit.finish()), after, "{before}");
        }
    }

    #[test]
    fn a_new_field_after_removals_has_a_comma_only_if_something_stands_before_it() {
        let set = |before: &str| {
            let object = object(before);
            let edit = Edit::of(&object)
                .remove(Field::N)
                .set(Field::Stream, "true");
            text(edit.finish())
        };
        assert_eq!(set(r"{}"), r#"{"stream":true}"#);
        assert_eq!(set(r"{ }"), r#"{ "stream":true}"#);
        assert_eq!(set(r#"{"n":1}"#), r#"{"stream":true}"#);
        assert_eq!(set(r#"{"x":0,"n":1}"#), r#"{"x":0,"stream":true}"#);
    }

    #[test]
    fn of_a_repeated_field_the_last_counts_and_one_remains() {
        let object = object(r#"{"n":1,"\u006e":2,"x":{"n":3}}"#);
        assert_eq!(object.value(Field::N).unwrap(), "2");
        let edit = Edit::of(&object).set(Field::N, "9");
        assert_eq!(text(edit.finish()), r#"{"\u006e":9,"x":{"n":3}}"#);
    }

    #[test]
    fn the_last_change_of_a_field_counts() {
        let object = object(r#"{"n":1}"#);
        let edit = Edit::of(&object).remove(Field::N).set(Field::N, "2");
        assert_eq!(text(edit.finish()), r#"{"n":2}"#);
        let edit = Edit::of(&object).set(Field::N, "2").remove(Field::N);
        assert_eq!(text(edit.finish()), "{}");
    }

    #[test]
    fn what_is_not_one_object_is_refused() {
        let deep = format!("{{\"x\":{}", "[".repeat(100_000));
        let many = format!("{{{}\"n\":1}}", "\"n\":1,".repeat(MAX_KNOWN));
        for text in [
            "",
            "[]",
            "null",
            "{",
            "{}{}",
            "{\"x\":NaN}",
            "{\"n\":1,}",
            &deep,
            &many,
        ] {
            assert!(Object::parse(Bytes::copy_from_slice(text.as_bytes())).is_err());
        }
        assert!(Object::parse(Bytes::from_static(b"{\"x\":\"\xff\"}")).is_err());
    }

    fn member() -> impl Strategy<Value = (String, String)> {
        let name = prop_oneof![
            Just("n".to_owned()),
            Just("stream".to_owned()),
            Just("kv_transfer_params".to_owned()),
            "[a-c,\"{}]{0,3}",
        ];
        let value = prop_oneof![
            Just("18446744073709551615".to_owned()),
            Just("0.10".to_owned()),
            Just(r#"{"n" : [1,{}]}"#.to_owned()),
            Just(r#""},{\"n\":1""#.to_owned()),
        ];
        (name, value)
    }

    fn blank() -> impl Strategy<Value = String> {
        "[ \n\t]{0,2}"
    }

    proptest! {
        #[test]
        fn what_was_added_can_be_taken_out_again_byte_for_byte(
            members in prop::collection::vec((member(), blank(), blank()), 0..6), params in member()
        ) {
            let members = members.iter().filter(|((name, _), ..)| name != "kv_transfer_params");
            let members: Vec<String> = members.map(|((name, value), a, b)| {
                format!("{a}{}{b}:{a}{value}{b}", serde_json::to_string(name).unwrap())
            }).collect();
            let before = format!(" {{{}}}\n", members.join(","));
            let original = object(&before);
            let with = text(Edit::of(&original).set(Field::KvTransferParams, params.1.clone()).finish());
            let with = object(&with);
            prop_assert_eq!(with.value(Field::KvTransferParams).unwrap(), params.1.as_bytes());
            prop_assert_eq!(text(Edit::of(&with).remove(Field::KvTransferParams).finish()), before);
        }

        #[test]
        fn edits_mean_what_they_mean_to_any_reader(
            members in prop::collection::vec((member(), blank(), blank()), 0..6)
        ) {
            let members: Vec<String> = members.iter().map(|((name, value), a, b)| {
                format!("{a}{}{b}:{value}{b}", serde_json::to_string(name).unwrap())
            }).collect();
            let before = format!("{{{}}}", members.join(","));
            let original = object(&before);
            let edit = Edit::of(&original).remove(Field::N).set(Field::Stream, "7");
            let mut expect: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&before).unwrap();
            expect.shift_remove("n");
            expect.insert("stream".to_owned(), 7.into());
            let after: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text(edit.finish())).unwrap();
            prop_assert_eq!(after, expect);
        }
    }
}
