//! `sglang`: both servers get the same request at once and meet in a room of prefill's bootstrap server.

use crate::edit::{Edit, Object};
use crate::field::Field;
use crate::target::Target;
use baton_http::Pieces;

/// What both servers are asked. `room` is below 2^63.
pub(crate) fn both(body: &Object, prefill: &Target, bootstrap_port: u16, room: u64) -> Pieces {
    Edit::of(body)
        .set(Field::BootstrapHost, super::quoted(prefill.host()))
        .set(Field::BootstrapPort, bootstrap_port.to_string())
        .set(Field::BootstrapRoom, room.to_string())
        .finish()
}

/// A room from eight random bytes.
pub(crate) fn room(random: [u8; 8]) -> u64 {
    u64::from_be_bytes(random) >> 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_meet_at_prefills_bootstrap_server() {
        let body = Object::parse(r#"{"text":"x"}"#.into()).unwrap();
        let target = Target::parse("[fd00::1]:8000").unwrap();
        assert_eq!(
            both(&body, &target, 8998, room([0xff; 8])).into_bytes(),
            r#"{"text":"x","bootstrap_host":"fd00::1","bootstrap_port":8998,"bootstrap_room":9223372036854775807}"#
        );
    }
}
