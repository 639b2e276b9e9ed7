//! What a request says by its headers, before its body is there.

use crate::names;
use baton_ext_proc::Headers;
use std::net::{IpAddr, SocketAddr};

/// What a path wants of its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Api {
    /// A prompt in the field of this name.
    Prompt(&'static str),
    /// Whatever it is, it goes to a server that generates, as it came.
    Other,
}

impl Api {
    /// By the end of the path; a query does not count.
    pub(crate) fn of(path: &str) -> Self {
        const KNOWN: [(&str, &str); 6] = [
            ("/chat/completions", "messages"),
            ("/completions", "prompt"),
            ("/responses", "input"),
            ("/embeddings", "input"),
            ("/conversations", "items"),
            ("/messages", "messages"),
        ];
        let path = path.split(['?', '#']).next().unwrap_or(path);
        let known = KNOWN.iter().find(|(end, _)| path.ends_with(end));
        known.map_or(Self::Other, |(_, field)| Self::Prompt(field))
    }
}

/// The first of the headers `names` that is there, as text.
pub(crate) fn first<'a>(headers: &'a Headers, names: &[&str]) -> Option<&'a str> {
    let text = names.iter().find_map(|name| headers.text(name))?.trim();
    (!text.is_empty()).then_some(text)
}

/// What the request's body must hold. Only what is posted asks for an answer to a prompt.
pub(crate) fn api(headers: &Headers) -> Api {
    match headers.get(":method") {
        Some(b"POST") => Api::of(first(headers, &names::PATHS).unwrap_or("")),
        _ => Api::Other,
    }
}

/// Whether the client prefers (RFC 7240) what is called `wish`, among whatever else.
pub(crate) fn prefers(headers: &Headers, wish: &str) -> bool {
    let is_prefer = |name: &[u8]| name.eq_ignore_ascii_case(names::PREFER.as_bytes());
    let mut said = headers.iter().filter(|(name, _)| is_prefer(name));
    said.any(|(_, wishes)| names_wish(wishes, wish))
}

/// Whether a list of wishes, with commas between and parameters after semicolons, names this one.
fn names_wish(wishes: &[u8], wish: &str) -> bool {
    let name = |said: &[u8]| {
        let end = said.iter().position(|b| *b == b';').unwrap_or(said.len());
        said[..end]
            .trim_ascii()
            .eq_ignore_ascii_case(wish.as_bytes())
    };
    wishes.split(|b| *b == b',').any(name)
}

/// Whether an answer with these headers is a stream of events.
pub(crate) fn is_event_stream(headers: &Headers) -> bool {
    let kind = headers.get("content-type").unwrap_or_default();
    let name = b"text/event-stream";
    kind.get(..name.len())
        .is_some_and(|kind| kind.eq_ignore_ascii_case(name))
}

/// Whether `endpoint` is one of those that a test selects: addresses with or without ports, with commas between.
pub(crate) fn selects(selection: &str, endpoint: SocketAddr) -> bool {
    let is_it = |text: &str| {
        let text = text.trim();
        let bare = text.trim_start_matches('[').trim_end_matches(']');
        text.parse() == Ok(endpoint) || bare.parse::<IpAddr>() == Ok(endpoint.ip())
    };
    selection.split(',').any(is_it)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_says_what_its_body_must_hold() {
        for (path, api) in [
            ("/v1/chat/completions", Api::Prompt("messages")),
            ("/v1/completions?x=/chat/completions", Api::Prompt("prompt")),
            ("/base/v1/responses", Api::Prompt("input")),
            ("/v1/messages", Api::Prompt("messages")),
            ("/v1/audio/transcriptions", Api::Other),
            ("", Api::Other),
        ] {
            assert_eq!(Api::of(path), api, "{path}");
        }
    }

    #[test]
    fn a_wish_is_found_among_others_and_whatever_its_parameters() {
        for (wishes, found) in [
            ("if-available", true),
            ("respond-async , IF-Available;x=1", true),
            ("if-available=no", false),
            ("if-available-soon", false),
            ("wait=1; if-available", false),
            ("", false),
        ] {
            assert_eq!(
                names_wish(wishes.as_bytes(), "if-available"),
                found,
                "{wishes}"
            );
        }
    }

    #[test]
    fn a_selection_names_machines_or_ports() {
        let endpoint = "[::1]:80".parse().unwrap();
        for (selection, selected) in [
            ("::1", true),
            ("[::1]", true),
            ("10.0.0.1, [::1]:80", true),
            ("[::1]:81", false),
            ("", false),
        ] {
            assert_eq!(selects(selection, endpoint), selected, "{selection}");
        }
    }
}
