//! Bytes as other engines write them, and what is left of damaged ones.

use super::*;
use crate::encode::{EventForm, Form, HashForm, encode};
use crate::msgpack::{put_array, put_binary, put_float, put_nil, put_text, put_unsigned};
use baton_kv::{BlockHash, CacheChange};
use proptest::prelude::*;

fn read(payload: &[u8]) -> Batch {
    decode(payload, &mut Groups::default()).unwrap()
}

/// A batch of events that are written one by one.
fn batch_of(events: &[Vec<u8>]) -> Vec<u8> {
    let mut out = Vec::new();
    put_array(&mut out, 2);
    put_float(&mut out, 1.5);
    put_array(&mut out, events.len());
    events.iter().for_each(|event| out.extend(event));
    out
}

fn removed_of(hash: u64, group: Option<u64>) -> Vec<u8> {
    let mut out = Vec::new();
    put_array(&mut out, if group.is_some() { 4 } else { 2 });
    put_text(&mut out, REMOVED);
    put_array(&mut out, 1);
    put_unsigned(&mut out, hash);
    if let Some(group) = group {
        put_text(&mut out, "GPU");
        put_unsigned(&mut out, group);
    }
    out
}

fn gone(hash: u64) -> BlockEvent {
    BlockEvent::Removed(Removed {
        hashes: vec![EngineHash(hash)],
        ..Removed::default()
    })
}

/// One block of two tokens, with what `more` appends from the adapter's number on.
fn stored_with(n_more: usize, more: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    put_array(&mut out, 5 + n_more);
    put_text(&mut out, STORED);
    put_array(&mut out, 1);
    put_binary(&mut out, &[9, 9, 0, 0, 0, 0, 0, 0, 0, 7]);
    put_nil(&mut out);
    put_array(&mut out, 2);
    put_unsigned(&mut out, 5);
    put_unsigned(&mut out, 70_000);
    put_unsigned(&mut out, 2);
    more(&mut out);
    out
}

fn only_stored(event: Vec<u8>) -> Stored {
    match read(&batch_of(&[event])).events.as_slice() {
        [BlockEvent::Stored(stored)] => stored.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_array_may_end_early_and_hashes_may_be_bytes() {
    let stored = only_stored(stored_with(0, |_| {}));
    assert_eq!(stored.hashes, [EngineHash(7)]);
    assert_eq!((stored.parent, stored.block_size), (None, 2));
    assert_eq!(stored.tokens, [5, 70_000]);
    assert_eq!((stored.medium, stored.group), (Medium::Device, None));
}

#[test]
fn an_adapter_goes_by_its_name_or_its_number() {
    let by_number = only_stored(stored_with(1, |out| put_unsigned(out, 3)));
    assert_eq!(by_number.adapter.as_deref(), Some("3"));
    let by_name = only_stored(stored_with(3, |out| {
        put_unsigned(out, 3);
        put_text(out, "CPU");
        put_text(out, "tuned");
    }));
    assert_eq!(by_name.adapter.as_deref(), Some("tuned"));
    assert_eq!(by_name.medium, Medium::Host);
}

#[test]
fn extra_keys_are_read_without_the_adapters_name() {
    let stored = only_stored(stored_with(4, |out| {
        put_nil(out);
        put_text(out, "DISK");
        put_text(out, "tuned");
        put_array(out, 1);
        put_array(out, 3);
        put_text(out, "tuned");
        put_array(out, 2);
        put_text(out, "image");
        put_unsigned(out, 12);
        put_text(out, "salt");
    }));
    assert_eq!(stored.medium, Medium::Other);
    assert_eq!(stored.extra, [["image", "salt"].map(Box::from)]);
    let none = only_stored(stored_with(4, |out| {
        put_nil(out);
        put_nil(out);
        put_nil(out);
        put_array(out, 1);
        put_nil(out);
    }));
    assert!(none.extra.is_empty());
}

#[test]
fn events_of_windows_and_states_are_left_out() {
    let window = stored_with(6, |out| {
        (0..4).for_each(|_| put_nil(out));
        put_unsigned(out, 1);
        put_text(out, "sliding_window");
    });
    let mut groups = Groups::default();
    let first = batch_of(&[removed_of(4, Some(1)), window]);
    assert_eq!(decode(&first, &mut groups).unwrap().events.len(), 1);
    let then = batch_of(&[removed_of(4, Some(1)), removed_of(5, Some(0))]);
    let then = decode(&then, &mut groups).unwrap();
    assert_eq!((then.events.len(), then.dropped), (1, 0));
}

#[test]
fn an_event_without_sense_costs_itself() {
    let mut wrong = Vec::new();
    put_array(&mut wrong, 2);
    put_text(&mut wrong, REMOVED);
    put_text(&mut wrong, "no list");
    let mut unknown = Vec::new();
    put_array(&mut unknown, 1);
    put_text(&mut unknown, "BlockAdmired");
    let short = stored_with(0, |out| *out.last_mut().unwrap() = 3);
    let nothing = vec![0xc0];
    let batch = read(&batch_of(&[
        removed_of(1, None),
        wrong,
        unknown,
        short,
        nothing,
        removed_of(2, None),
    ]));
    assert_eq!(batch.events, [gone(1), gone(2)]);
    assert_eq!((batch.ts, batch.rank, batch.dropped), (1.5, None, 3));
}

/// The batch that vLLM 0.24 writes: maps throughout.
#[test]
fn maps_are_read_in_any_order_and_with_keys_of_tomorrow() {
    let mut out = vec![0x84];
    put_text(&mut out, "data_parallel_rank");
    put_unsigned(&mut out, 2);
    put_text(&mut out, "later");
    put_array(&mut out, 1);
    put_nil(&mut out);
    put_text(&mut out, "events");
    put_array(&mut out, 2);
    out.push(0x84);
    put_text(&mut out, "locality");
    put_text(&mut out, "REMOTE");
    put_text(&mut out, "block_hashes");
    put_array(&mut out, 1);
    put_unsigned(&mut out, u64::MAX);
    put_text(&mut out, "medium");
    put_text(&mut out, "GPU");
    put_text(&mut out, TAG);
    put_text(&mut out, REMOVED);
    out.push(0x81);
    put_text(&mut out, TAG);
    put_text(&mut out, CLEARED);
    put_text(&mut out, "ts");
    put_float(&mut out, 2.5);
    let batch = read(&out);
    let removed = BlockEvent::Removed(Removed {
        hashes: vec![EngineHash(u64::MAX)],
        medium: Medium::Other,
        group: None,
    });
    assert_eq!(batch.events, [removed, BlockEvent::Cleared]);
    assert_eq!((batch.ts, batch.rank, batch.dropped), (2.5, Some(2), 0));
}

#[test]
fn signed_hashes_keep_their_bits() {
    let mut event = Vec::new();
    put_array(&mut event, 2);
    put_text(&mut event, REMOVED);
    event.extend([0x91, 0xd3]);
    event.extend((-2_i64).to_be_bytes());
    assert_eq!(read(&batch_of(&[event])).events, [gone(u64::MAX - 1)]);
}

#[test]
fn what_is_no_batch_is_refused() {
    for payload in [
        &[][..],
        &[0xc0],
        &[0x90],
        &[0x92, 1, 2],
        b"text",
        &[0x92, 1, 0x92, 1],
    ] {
        assert!(
            decode(payload, &mut Groups::default()).is_err(),
            "{payload:x?}"
        );
    }
}

fn any_change(block_size: usize) -> impl Strategy<Value = CacheChange> {
    let hash = any::<[u8; 32]>().prop_map(BlockHash);
    let hashes = prop::collection::vec(hash.clone(), 1..5);
    prop_oneof![
        (prop::option::of(hash), hashes.clone()).prop_map(move |(parent, hashes)| {
            let n = hashes.len() * block_size;
            let tokens = (0..n).map(|i| (i * 7919) as u32).collect();
            CacheChange::Stored {
                parent,
                hashes,
                tokens,
            }
        }),
        hashes.prop_map(CacheChange::Removed),
        Just(CacheChange::Cleared),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_is_read(
        changes in prop::collection::vec(any_change(4), 0..20),
        as_map: bool,
        as_bytes: bool,
    ) {
        let form = Form {
            events: if as_map { EventForm::Map } else { EventForm::Array },
            hashes: if as_bytes { HashForm::Bytes } else { HashForm::Int },
        };
        let mut payload = Vec::new();
        encode(1e9, &changes, 4, form, &mut payload);
        let batch = read(&payload);
        let expected: Vec<_> = changes.iter().map(|change| change.to_event(4)).collect();
        prop_assert_eq!(batch.events, expected);
        prop_assert_eq!((batch.ts, batch.rank, batch.dropped), (1e9, Some(0), 0));
        for end in 0..payload.len() {
            let _ = decode(&payload[..end], &mut Groups::default());
        }
    }

    #[test]
    fn damage_never_panics(changes in prop::collection::vec(any_change(2), 1..6), at: prop::sample::Index, byte: u8) {
        let mut payload = Vec::new();
        encode(0.0, &changes, 2, Form::default(), &mut payload);
        let at = at.index(payload.len());
        payload[at] = byte;
        let _ = decode(&payload, &mut Groups::default());
    }
}
