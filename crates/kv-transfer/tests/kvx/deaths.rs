//! Processes that are killed in the middle of a hand-over, words that are lost, and callers that change their mind while
//! bytes are on their way.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use crate::common::*;
use crate::process::{Process, SEED};
use baton_kv_transfer::{KvClient, RejectCode, TransferError};

const N: u32 = 4;

fn refused(outcome: Outcome) -> RejectCode {
    match outcome {
        Err(TransferError::Rejected(code)) => code,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_producer_that_was_killed_and_started_again_on_its_port_gives_nothing_of_before() {
    let client = KvClient::new(client_config()).unwrap();
    let (producer, old) = Process::producer("127.0.0.1:0", N, None);
    let held = client.hold(&old).unwrap();
    assert!(pull(&client, &held, 0..1).unwrap().data() == select(&bytes(N, SEED), 0..1));
    producer.kill();
    let addr = format!("127.0.0.1:{}", old.remote_port);
    let (_producer, new) = Process::producer(&addr, N, None);
    // The link may find out only now that its connection is dead, and pause.
    let again = || match pull(&client, &held, 1..N) {
        Err(TransferError::Rejected(code)) => Some(code),
        Err(TransferError::Connect(_) | TransferError::Broken(_)) => None,
        other => panic!("{other:?}"),
    };
    eventually("the new process answers", || {
        again().is_some_and(|code| code == RejectCode::UnknownLease)
    });
    // A lease of the same number, as chance may have it.
    let mut same_number = old;
    same_number.uuid = new.uuid;
    let misled = client.hold(&same_number).unwrap();
    assert_eq!(refused(pull(&client, &misled, 0..N)), RejectCode::BadToken);
    drop(misled);
    assert!(fetch(&client, &new).unwrap().data() == bytes(N, SEED));
}

#[test]
fn a_producer_that_is_killed_in_mid_transfer_is_an_error_and_soon() {
    let client = KvClient::new(client_config()).unwrap();
    let (producer, params) = Process::producer("127.0.0.1:0", N, None);
    let (tx, rx) = channel();
    let (go, gone) = channel::<()>();
    let addr = format!("127.0.0.1:{}", params.remote_port);
    let proxy = Proxy::start(
        addr.parse().unwrap(),
        Box::new(move |header, wire| {
            if header.chunk == 3 {
                let _ = tx.send(());
                let _ = gone.recv_timeout(PATIENCE);
                return Fate::Cut;
            }
            Fate::Forward(wire)
        }),
    );
    let held = client.hold(&proxy.divert(&params)).unwrap();
    let (_guard, outcome) = start_pull(&client, &held, 0..N);
    rx.recv_timeout(PATIENCE).unwrap();
    producer.kill();
    go.send(()).unwrap();
    assert!(outcome.recv_timeout(PATIENCE).unwrap().is_err());
    eventually("the memory is returned", || client.stats().budget_used == 0);
}

#[test]
fn what_a_consumer_was_fetching_when_it_was_killed_another_one_fetches() {
    let mut cfg = server_config();
    cfg.lease_ttl = 10 * PATIENCE;
    let server = start(cfg);
    let (tx, rx) = channel();
    let stall = move |header: &baton_kv_transfer::wire::ChunkHeader, wire| match header.chunk {
        0..3 => Fate::Forward(wire),
        _ => {
            let _ = tx.send(());
            Fate::Stall
        }
    };
    let proxy = Proxy::start(server.local_addr(), Box::new(stall));
    let params = server.publish(&export(N, SEED)).unwrap();
    let mut consumer = Process::start("consumer", None);
    consumer.say("600000");
    consumer.say(&serde_json::to_string(&proxy.divert(&params)).unwrap());
    rx.recv_timeout(PATIENCE).unwrap();
    let other = KvClient::new(client_config()).unwrap();
    let held = other.hold(&params).unwrap();
    assert_eq!(refused(pull(&other, &held, 0..N)), RejectCode::Busy);
    consumer.kill();
    eventually("the lease is free again", || {
        match pull(&other, &held, 0..N) {
            Ok(pulled) => pulled.data() == bytes(N, SEED),
            busy => refused(busy) != RejectCode::Busy,
        }
    });
    assert!(server.wait_idle(PATIENCE), "it was released");
    assert_eq!(server.stats().expired, 0);
}

#[test]
fn a_lease_whose_release_is_lost_ends_by_itself() {
    let mut cfg = server_config();
    cfg.lease_ttl = Duration::from_millis(300);
    let server = start(cfg);
    let client = KvClient::new(client_config()).unwrap();
    let is_deaf = Arc::new(AtomicBool::new(false));
    let deafen = Arc::clone(&is_deaf);
    let last = N * layout().block_bytes() as u32 / layout().n_layers / 1000 * layout().n_layers;
    let tamper = move |header: &baton_kv_transfer::wire::ChunkHeader, wire| {
        deafen.fetch_or(header.chunk >= last, Ordering::SeqCst);
        Fate::Forward(wire)
    };
    let proxy = Proxy::deaf(server.local_addr(), Box::new(tamper), is_deaf);
    let params = proxy.divert(&server.publish(&export(N, 1)).unwrap());
    assert!(fetch(&client, &params).unwrap().data() == bytes(N, 1));
    assert!(server.wait_idle(PATIENCE));
    assert_eq!((server.stats().expired, server.stats().transfers), (1, 0));
    drop(client);
    eventually("the pool is empty", || server.stats().lease_bytes == 0);
}

#[test]
fn a_lease_that_is_released_twice_is_released_once() {
    let server = start(server_config());
    let client = KvClient::new(client_config()).unwrap();
    let params = server.publish(&export(N, 1)).unwrap();
    let (one, two) = (client.hold(&params).unwrap(), client.hold(&params).unwrap());
    assert!(pull(&client, &one, 0..N).is_ok(), "which releases it");
    assert!(server.wait_idle(PATIENCE));
    drop((one, two));
    let token = params.kvx.as_ref().unwrap().tok;
    let revoked = server.revoke(params.uuid, &token);
    assert_eq!(revoked, Err(RejectCode::UnknownLease));
    assert_eq!(server.stats().transfers, 1);
    assert!(fetch(&client, &server.publish(&export(N, 2)).unwrap()).is_ok());
}

#[test]
fn bytes_that_come_after_a_cancel_are_never_written_into_what_others_got() {
    let server = start(server_config());
    let mut cfg = client_config();
    // There is one buffer: the next transfer gets that of the cancelled one.
    cfg.budget_bytes = u64::from(N) * layout().block_bytes() as u64;
    let client = KvClient::new(cfg).unwrap();
    let (tx, rx) = channel();
    let (go, gone) = channel::<()>();
    let mut is_first = true;
    let hold_back = move |header: &baton_kv_transfer::wire::ChunkHeader, wire| {
        if header.chunk == 3 && std::mem::take(&mut is_first) {
            let _ = tx.send(());
            let _ = gone.recv_timeout(PATIENCE);
        }
        Fate::Forward(wire)
    };
    let proxy = Proxy::start(server.local_addr(), Box::new(hold_back));
    let held = client
        .hold(&proxy.divert(&server.publish(&export(N, 1)).unwrap()))
        .unwrap();
    let (guard, outcome) = start_pull(&client, &held, 0..N);
    rx.recv_timeout(PATIENCE).unwrap();
    drop(guard);
    let cancelled = outcome.recv_timeout(PATIENCE).unwrap();
    assert_eq!(cancelled.unwrap_err(), TransferError::Cancelled);
    let other = fetch(&client, &server.publish(&export(N, 2)).unwrap()).unwrap();
    go.send(()).unwrap();
    drop(held);
    assert!(server.wait_idle(PATIENCE));
    assert!(other.data() == bytes(N, 2));
}
