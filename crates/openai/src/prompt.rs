//! The four forms of a completion's prompt.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};

/// Most prompts in one request.
const MAX_PROMPTS: usize = 16_384;

/// What is to be completed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// One text.
    Text(String),
    /// Several texts; none at all if the list was empty.
    Texts(Vec<String>),
    /// One prompt of token ids, not yet checked against a vocabulary.
    Ids(Vec<u32>),
    /// Several prompts of token ids.
    IdLists(Vec<Vec<u32>>),
}

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PromptVisitor;
        impl<'de> Visitor<'de> for PromptVisitor {
            type Value = Prompt;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "a string, a list of strings, a list of token ids, or a list of such lists",
                )
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Prompt, E> {
                Ok(Prompt::Text(text.to_owned()))
            }
            fn visit_string<E: Error>(self, text: String) -> Result<Prompt, E> {
                Ok(Prompt::Text(text))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Prompt, A::Error> {
                match seq.next_element()? {
                    None => Ok(Prompt::Texts(Vec::new())),
                    Some(Element::Text(text)) => rest(text, MAX_PROMPTS, seq).map(Prompt::Texts),
                    Some(Element::Ids(ids)) => rest(ids, MAX_PROMPTS, seq).map(Prompt::IdLists),
                    Some(Element::Id(id)) => rest(id, usize::MAX, seq).map(Prompt::Ids),
                }
            }
        }
        deserializer.deserialize_any(PromptVisitor)
    }
}

/// The list whose first element is `first`; all others must be of its kind.
fn rest<'de, A, T>(first: T, limit: usize, mut seq: A) -> Result<Vec<T>, A::Error>
where
    A: SeqAccess<'de>,
    T: Deserialize<'de>,
{
    let mut items = vec![first];
    while let Some(item) = seq.next_element()? {
        if items.len() == limit {
            return Err(A::Error::custom(format_args!("more than {limit} prompts")));
        }
        items.push(item);
    }
    Ok(items)
}

/// The first element of a list decides what the list is.
enum Element {
    Text(String),
    Id(u32),
    Ids(Vec<u32>),
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ElementVisitor;
        impl<'de> Visitor<'de> for ElementVisitor {
            type Value = Element;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token id, or a list of token ids")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Element, E> {
                Ok(Element::Text(text.to_owned()))
            }
            fn visit_u64<E: Error>(self, id: u64) -> Result<Element, E> {
                u32::try_from(id)
                    .map(Element::Id)
                    .map_err(|_| E::custom("no vocabulary has this token id"))
            }
            fn visit_i64<E: Error>(self, _: i64) -> Result<Element, E> {
                Err(E::custom("input should be greater than or equal to 0"))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Element, A::Error> {
                let mut ids = Vec::new();
                while let Some(id) = seq.next_element()? {
                    ids.push(id);
                }
                Ok(Element::Ids(ids))
            }
        }
        deserializer.deserialize_any(ElementVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Option<Prompt> {
        serde_json::from_str(text).ok()
    }

    #[test]
    fn every_form_of_prompt_is_told_apart_by_its_first_element() {
        assert_eq!(read(r#""a""#), Some(Prompt::Text("a".into())));
        assert_eq!(read("[]"), Some(Prompt::Texts(vec![])));
        assert_eq!(
            read(r#"["a","b"]"#),
            Some(Prompt::Texts(vec!["a".into(), "b".into()]))
        );
        assert_eq!(read("[1,2]"), Some(Prompt::Ids(vec![1, 2])));
        assert_eq!(
            read("[[1],[]]"),
            Some(Prompt::IdLists(vec![vec![1], vec![]]))
        );
    }

    #[test]
    fn mixtures_and_other_types_are_refused() {
        for text in [
            "5",
            "{}",
            "[1,\"a\"]",
            "[\"a\",1]",
            "[[1],2]",
            "[1,-5]",
            "[4294967296]",
            "[1.5]",
            "[true]",
        ] {
            assert_eq!(read(text), None, "{text}");
        }
    }
}
