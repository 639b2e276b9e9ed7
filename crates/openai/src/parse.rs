//! From the bytes of a body to a typed request, or to the error that vLLM's pydantic layer gives in that case.

use serde::de::DeserializeOwned;
use serde_json::error::Category;

use crate::{ApiError, ErrorKind};

/// Reads `T` from a JSON body. The `param` of an error is the dotted path of the field at fault.
pub(crate) fn from_slice<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let first = body.iter().find(|b| !b.is_ascii_whitespace());
    match first {
        None => return Err(ApiError::validation("body".into(), "field required")),
        Some(b'[' | b'"' | b'0'..=b'9' | b'-' | b't' | b'f' | b'n') => {
            return Err(not_an_object(body));
        }
        Some(_) => {}
    }
    let mut json = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut json)
        .map_err(|e| shape_error(body, &dotted(e.path()), e.inner()))?;
    json.end().map_err(|e| shape_error(body, "", &e))?;
    Ok(value)
}

/// A body that is no object: its syntax is still judged first, as a JSON reader would.
fn not_an_object(body: &[u8]) -> ApiError {
    match serde_json::from_slice::<serde::de::IgnoredAny>(body) {
        Err(e) => shape_error(body, "", &e),
        Ok(_) => ApiError::validation("body".into(), "input should be a valid object"),
    }
}

fn shape_error(body: &[u8], path: &str, error: &serde_json::Error) -> ApiError {
    match error.classify() {
        Category::Data | Category::Io => data_error(path, &error.to_string()),
        Category::Eof => syntax_error(body, body.len(), "unexpected end"),
        Category::Syntax if is_lone_surrogate(error) => ApiError::new(
            ErrorKind::BadRequest,
            "a string holds half of a surrogate pair, which is not text",
        ),
        Category::Syntax => syntax_error(
            body,
            offset(body, error),
            &without_position(&error.to_string()),
        ),
    }
}

/// serde says "missing field `x`" at the place of the object; the client wants the field's own place.
fn data_error(path: &str, message: &str) -> ApiError {
    let message = without_position(message);
    let missing = message
        .strip_prefix("missing field `")
        .and_then(|rest| rest.strip_suffix('`'));
    match missing {
        Some(field) => ApiError::validation(format!("body{path}.{field}"), "field required"),
        None => ApiError::validation(format!("body{path}"), &message),
    }
}

fn syntax_error(body: &[u8], at: usize, reason: &str) -> ApiError {
    // Positions count characters, as Python's do.
    let before = body.get(..at).unwrap_or(body);
    let characters = String::from_utf8_lossy(before).chars().count();
    ApiError::validation(
        format!("body.{characters}"),
        &format!("JSON decode error: {reason}"),
    )
}

/// Byte offset of a syntax error, from its line and column.
fn offset(body: &[u8], error: &serde_json::Error) -> usize {
    let line_start: usize = body
        .split_inclusive(|&b| b == b'\n')
        .take(error.line().saturating_sub(1))
        .map(<[u8]>::len)
        .sum();
    line_start + error.column().saturating_sub(1)
}

fn is_lone_surrogate(error: &serde_json::Error) -> bool {
    let text = error.to_string();
    text.starts_with("lone leading surrogate") || text.starts_with("unexpected end of hex escape")
}

/// serde_json appends " at line L column C", which the path already tells.
fn without_position(message: &str) -> String {
    match message.rfind(" at line ") {
        Some(cut) => message[..cut].to_owned(),
        None => message.to_owned(),
    }
}

/// `.a.0.b` for `a[0].b`; nothing for the root.
fn dotted(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    let mut text = String::new();
    for segment in path {
        text.push('.');
        match segment {
            Segment::Seq { index } => text.push_str(&index.to_string()),
            Segment::Map { key } => text.push_str(key),
            Segment::Enum { variant } => text.push_str(variant),
            Segment::Unknown => text.push('?'),
        }
    }
    text
}
