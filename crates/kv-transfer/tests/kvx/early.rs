//! KV that is fetched while it is being computed.

use std::ops::Range;
use std::sync::mpsc::Receiver;

use crate::common::*;
use baton_kv::{BlockId, KvTransferParams};
use baton_kv_transfer::{Building, KvClient, KvServer, Pulled, RejectCode, TransferError};

const N: u32 = 9;
const TOKENS: u32 = N * 4 - 1;

fn ids(blocks: Range<u32>) -> Vec<BlockId> {
    blocks.map(|i| BlockId(100 + i)).collect()
}

fn append(building: &mut Building, blocks: Range<u32>) {
    let data = select(&bytes(N, 1), blocks.clone());
    let mut room = building.room(blocks.len()).unwrap();
    room.copy_from_slice(&data);
    building.append(&ids(blocks), room).unwrap();
}

fn begin(server: &KvServer) -> (KvTransferParams, Building) {
    let (params, building) = server.begin(TOKENS).unwrap();
    assert!(params.remote_block_ids.is_empty());
    assert!(params.kvx.as_ref().unwrap().early);
    (params, building)
}

fn next(parts: &Receiver<Outcome>) -> Outcome {
    parts.recv_timeout(PATIENCE).expect("another part")
}

/// The part's blocks, its bytes having been found right.
fn blocks(part: &Pulled) -> Range<u32> {
    let blocks = part.first_block..part.first_block + part.n_blocks;
    assert!(part.data() == select(&bytes(N, 1), blocks.clone()));
    blocks
}

fn both() -> (KvServer, KvClient) {
    pair(false)
}

fn pair(tls: bool) -> (KvServer, KvClient) {
    let (server, client) = configs(tls);
    (start(server), KvClient::new(client).unwrap())
}

#[test]
fn parts_arrive_as_they_are_computed() {
    [false, true].into_iter().for_each(parts_arrive);
}

fn parts_arrive(tls: bool) {
    let (server, client) = pair(tls);
    let (params, mut building) = begin(&server);
    let held = client.hold(&params).unwrap();
    assert_eq!((held.n_blocks(), held.n_tokens()), (N, TOKENS));
    let (_guard, parts) = start_pull(&client, &held, 2..N);
    append(&mut building, 0..1);
    append(&mut building, 1..4);
    let first = next(&parts).unwrap();
    assert_eq!((blocks(&first), first.more), (2..4, true));
    append(&mut building, 4..8);
    let second = next(&parts).unwrap();
    assert_eq!((blocks(&second), second.more), (4..8, true));
    append(&mut building, 8..9);
    let params = building.finish().unwrap();
    assert_eq!(params.remote_block_ids, (100..109).collect::<Vec<_>>());
    let last = next(&parts).unwrap();
    assert_eq!((blocks(&last), last.more), (8..9, false));
    assert!(server.wait_idle(PATIENCE), "the lease was consumed");
    drop((first, second, last));
    eventually("all memory is free", || {
        server.stats().lease_bytes == 0 && client.stats().budget_used == 0
    });
    assert_eq!(client.stats().complete, 1);
}

#[test]
fn what_was_computed_in_parts_can_be_fetched_late() {
    let (server, client) = both();
    let (_, mut building) = begin(&server);
    append(&mut building, 0..5);
    append(&mut building, 5..9);
    let params = building.finish().unwrap();
    let held = client.hold(&params).unwrap();
    let (_guard, parts) = start_pull(&client, &held, 1..N);
    let all = next(&parts).unwrap();
    assert_eq!((blocks(&all), all.more), (1..9, false));
}

#[test]
fn a_prefill_that_ends_early_ends_the_transfer_at_once() {
    let (server, client) = both();
    for n_parts in 0..2 {
        let (params, mut building) = begin(&server);
        let held = client.hold(&params).unwrap();
        let (_guard, parts) = start_pull(&client, &held, 0..N);
        if n_parts == 1 {
            append(&mut building, 0..3);
            assert!(next(&parts).unwrap().more);
        }
        drop(building);
        let ended = next(&parts).unwrap_err();
        assert_eq!(ended, TransferError::Rejected(RejectCode::Expired));
    }
    eventually("all memory is free", || server.stats().lease_bytes == 0);
}

#[test]
fn an_announcement_outlives_the_ttl_and_a_finished_lease_does_not() {
    let mut cfg = server_config();
    cfg.lease_ttl = std::time::Duration::from_millis(20);
    let server = start(cfg);
    let (_, mut building) = begin(&server);
    let other = server.publish(&export(1, 1)).unwrap();
    eventually("the other lease ends", || server.stats().expired == 1);
    assert!(!server.release(other.uuid));
    append(&mut building, 0..9);
    building.finish().unwrap();
    eventually("so does this one", || server.stats().expired == 2);
}

#[test]
fn a_consumer_that_gives_up_leaves_the_lease_to_its_time() {
    let (server, client) = both();
    let (params, mut building) = begin(&server);
    let held = client.hold(&params).unwrap();
    let (guard, parts) = start_pull(&client, &held, 0..N);
    append(&mut building, 0..3);
    assert!(next(&parts).unwrap().more);
    drop((guard, held));
    assert_eq!(next(&parts).unwrap_err(), TransferError::Cancelled);
    eventually("the lease is released", || server.stats().leases == 0);
    let room = building.room(1).unwrap();
    assert!(building.append(&ids(3..4), room).is_err());
    assert_eq!(building.finish(), None);
}

#[test]
fn a_producer_that_goes_away_ends_what_waits_for_it() {
    let (server, client) = both();
    let (params, building) = begin(&server);
    let held = client.hold(&params).unwrap();
    let (_guard, parts) = start_pull(&client, &held, 0..N);
    drop(server);
    assert!(next(&parts).is_err());
    drop(building);
}

#[test]
fn blocks_that_were_not_announced_are_refused() {
    let (server, _) = both();
    let (_, mut building) = begin(&server);
    let refuses = |building: &mut Building, n_blocks, blocks: Range<u32>| {
        let room = building.room(n_blocks).unwrap();
        assert!(building.append(&ids(blocks), room).is_err());
    };
    refuses(&mut building, 2, 0..1);
    refuses(&mut building, 0, 0..0);
    refuses(&mut building, 10, 0..10);
    append(&mut building, 0..9);
    refuses(&mut building, 1, 9..10);
    assert!(server.begin(0).is_err());
    server.drain();
    assert!(server.begin(1).is_err());
}
