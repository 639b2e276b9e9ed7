//! Scalars read as pydantic reads them: a number may stand in a string, an integer may be written `2.0`, a boolean
//! may be `"yes"` or `1`. `null` is absence. Numbers that were integers in the text never pass through floating point.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};

/// Whole numbers a double holds exactly.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// An optional integer.
pub(crate) fn integer<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<i64>, D::Error> {
    match deserializer.deserialize_any(IntegerVisitor)? {
        None => Ok(None),
        Some(wide) => i64::try_from(wide)
            .map(Some)
            .map_err(|_| D::Error::custom("input is out of range")),
    }
}

/// An optional random seed: any 64-bit integer, signed or not; its bits are the seed.
pub(crate) fn seed<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let bits = |wide: i128| {
        let signed = i64::try_from(wide).map(i64::cast_unsigned);
        signed
            .or_else(|_| u64::try_from(wide))
            .map_err(|_| D::Error::custom("input does not fit 64 bits"))
    };
    deserializer
        .deserialize_any(IntegerVisitor)?
        .map(bits)
        .transpose()
}

/// An optional number.
pub(crate) fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    deserializer.deserialize_any(NumberVisitor)
}

/// An optional boolean.
pub(crate) fn boolean<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<bool>, D::Error> {
    deserializer.deserialize_any(BooleanVisitor)
}

/// A boolean that is `false` when absent.
pub(crate) fn flag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    boolean(deserializer).map(Option::unwrap_or_default)
}

/// A list of at most `MAX` elements, so that small text cannot become large memory; `null` is the empty list.
pub(crate) fn bounded<'de, D, T, const MAX: usize>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    struct Bounded<T, const MAX: usize>(PhantomData<T>);
    impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Bounded<T, MAX> {
        type Value = Vec<T>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a valid list")
        }
        fn visit_unit<E: Error>(self) -> Result<Vec<T>, E> {
            Ok(Vec::new())
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
            let mut items = Vec::new();
            while let Some(item) = seq.next_element()? {
                if items.len() == MAX {
                    return Err(A::Error::custom(format_args!("more than {MAX} items")));
                }
                items.push(item);
            }
            Ok(items)
        }
    }
    deserializer.deserialize_any(Bounded::<T, MAX>(PhantomData))
}

/// One text, or a bounded list of texts; `null` is the empty list.
pub(crate) fn texts<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    struct Texts;
    impl<'de> Visitor<'de> for Texts {
        type Value = Vec<String>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a valid string or a list of strings")
        }
        fn visit_unit<E: Error>(self) -> Result<Vec<String>, E> {
            Ok(Vec::new())
        }
        fn visit_str<E: Error>(self, text: &str) -> Result<Vec<String>, E> {
            Ok(vec![text.to_owned()])
        }
        fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Vec<String>, A::Error> {
            bounded::<_, String, MAX_TEXTS>(serde::de::value::SeqAccessDeserializer::new(seq))
        }
    }
    deserializer.deserialize_any(Texts)
}

/// Most texts in a list of stop strings.
const MAX_TEXTS: usize = 1024;

struct IntegerVisitor;

impl Visitor<'_> for IntegerVisitor {
    type Value = Option<i128>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a valid integer")
    }
    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_bool<E: Error>(self, v: bool) -> Result<Self::Value, E> {
        Ok(Some(i128::from(v)))
    }
    fn visit_i64<E: Error>(self, v: i64) -> Result<Self::Value, E> {
        Ok(Some(i128::from(v)))
    }
    fn visit_u64<E: Error>(self, v: u64) -> Result<Self::Value, E> {
        Ok(Some(i128::from(v)))
    }
    fn visit_f64<E: Error>(self, v: f64) -> Result<Self::Value, E> {
        if v.fract() != 0.0 {
            return Err(E::custom(
                "input should be a valid integer, got a number with a fractional part",
            ));
        }
        if v.abs() > EXACT {
            return Err(E::custom(
                "input should be a valid integer, got a number too large to be exact",
            ));
        }
        #[expect(clippy::cast_possible_truncation, reason = "whole and within 2^53")]
        Ok(Some(v as i128))
    }
    fn visit_str<E: Error>(self, v: &str) -> Result<Self::Value, E> {
        v.trim().parse().map(Some).map_err(|_| {
            E::custom("input should be a valid integer, unable to parse string as an integer")
        })
    }
}

struct NumberVisitor;

impl Visitor<'_> for NumberVisitor {
    type Value = Option<f64>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a valid number")
    }
    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_bool<E: Error>(self, v: bool) -> Result<Self::Value, E> {
        Ok(Some(f64::from(u8::from(v))))
    }
    #[expect(
        clippy::cast_precision_loss,
        reason = "a sampling parameter, rounded as Python rounds it"
    )]
    fn visit_i64<E: Error>(self, v: i64) -> Result<Self::Value, E> {
        Ok(Some(v as f64))
    }
    #[expect(
        clippy::cast_precision_loss,
        reason = "a sampling parameter, rounded as Python rounds it"
    )]
    fn visit_u64<E: Error>(self, v: u64) -> Result<Self::Value, E> {
        Ok(Some(v as f64))
    }
    fn visit_f64<E: Error>(self, v: f64) -> Result<Self::Value, E> {
        Ok(Some(v))
    }
    fn visit_str<E: Error>(self, v: &str) -> Result<Self::Value, E> {
        v.trim().parse().map(Some).map_err(|_| {
            E::custom("input should be a valid number, unable to parse string as a number")
        })
    }
}

struct BooleanVisitor;

impl Visitor<'_> for BooleanVisitor {
    type Value = Option<bool>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a valid boolean")
    }
    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_bool<E: Error>(self, v: bool) -> Result<Self::Value, E> {
        Ok(Some(v))
    }
    fn visit_i64<E: Error>(self, v: i64) -> Result<Self::Value, E> {
        match v {
            0 => Ok(Some(false)),
            1 => Ok(Some(true)),
            _ => Err(unreadable()),
        }
    }
    fn visit_u64<E: Error>(self, v: u64) -> Result<Self::Value, E> {
        self.visit_i64(i64::try_from(v).unwrap_or(-1))
    }
    fn visit_f64<E: Error>(self, v: f64) -> Result<Self::Value, E> {
        match v {
            0.0 => Ok(Some(false)),
            1.0 => Ok(Some(true)),
            _ => Err(unreadable()),
        }
    }
    fn visit_str<E: Error>(self, v: &str) -> Result<Self::Value, E> {
        match v.to_ascii_lowercase().as_str() {
            "0" | "false" | "f" | "no" | "n" | "off" => Ok(Some(false)),
            "1" | "true" | "t" | "yes" | "y" | "on" => Ok(Some(true)),
            _ => Err(unreadable()),
        }
    }
}

fn unreadable<E: Error>() -> E {
    E::custom("input should be a valid boolean, unable to interpret input")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_integer(text: &str) -> Option<Option<i64>> {
        integer(&mut serde_json::Deserializer::from_str(text)).ok()
    }
    fn read_seed(text: &str) -> Option<Option<u64>> {
        seed(&mut serde_json::Deserializer::from_str(text)).ok()
    }
    fn read_bool(text: &str) -> Option<Option<bool>> {
        boolean(&mut serde_json::Deserializer::from_str(text)).ok()
    }
    fn read_number(text: &str) -> Option<Option<f64>> {
        number(&mut serde_json::Deserializer::from_str(text)).ok()
    }

    #[test]
    fn integers_come_as_numbers_strings_and_whole_floats() {
        for (text, value) in [
            ("2", Some(Some(2))),
            ("-1", Some(Some(-1))),
            (r#"" 2 ""#, Some(Some(2))),
            ("2.0", Some(Some(2))),
            ("true", Some(Some(1))),
            ("null", Some(None)),
            ("9223372036854775807", Some(Some(i64::MAX))),
            ("9223372036854775808", None),
            ("2.5", None),
            ("1e300", None),
            (r#""abc""#, None),
            ("[]", None),
        ] {
            assert_eq!(read_integer(text), value, "{text}");
        }
    }

    #[test]
    fn a_seed_keeps_all_sixty_four_bits() {
        assert_eq!(read_seed("18446744073709551615"), Some(Some(u64::MAX)));
        assert_eq!(read_seed("-1"), Some(Some(u64::MAX)));
        assert_eq!(
            read_seed("9007199254740993"),
            Some(Some(9_007_199_254_740_993))
        );
        assert_eq!(read_seed("18446744073709551616"), None);
    }

    #[test]
    fn booleans_and_numbers_are_read_as_pydantic_reads_them() {
        assert_eq!(read_bool(r#""YES""#), Some(Some(true)));
        assert_eq!(read_bool("0"), Some(Some(false)));
        assert_eq!(read_bool("2"), None);
        assert_eq!(read_bool(r#""maybe""#), None);
        assert_eq!(read_number(r#""0.5""#), Some(Some(0.5)));
        assert_eq!(read_number("3"), Some(Some(3.0)));
        assert_eq!(read_number("{}"), None);
    }
}
