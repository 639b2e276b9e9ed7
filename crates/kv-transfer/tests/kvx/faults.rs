//! Hand-overs that go wrong on the way: damaged, cut, stalled and forged chunks, peers that die, callers that
//! change their mind. Whatever happens, nobody gets a wrong byte and nothing leaks.

use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use crate::common::*;
use baton_kv_transfer::wire::{CHUNK_HEADER_LEN, ChunkHeader, WireError};
use baton_kv_transfer::{KvClient, RejectCode, TransferError};

const N: u32 = 4;

/// Fetches `N` blocks through a proxy with `tamper`.
fn fetch_through(tamper: Tamper) -> (Outcome, u64) {
    let (server, client) = (start(server_config()), KvClient::new(quick()).unwrap());
    let proxy = Proxy::start(server.local_addr(), tamper);
    let params = proxy.divert(&server.publish(&export(N, 1)).unwrap());
    let outcome = fetch(&client, &params);
    let damaged = client.stats().crc_errors;
    (outcome, damaged)
}

fn quick() -> baton_kv_transfer::KvClientConfig {
    let mut cfg = client_config();
    cfg.idle_timeout = Duration::from_secs(2);
    cfg
}

fn flip(mut wire: Vec<u8>) -> Fate {
    wire[CHUNK_HEADER_LEN + 3] ^= 0x10;
    Fate::Forward(wire)
}

fn forge(wire: &[u8], header: ChunkHeader) -> Fate {
    Fate::Forward([&header.encode()[..], &wire[CHUNK_HEADER_LEN..]].concat())
}

#[test]
fn a_damaged_chunk_is_found_and_sent_again() {
    let mut times = 2;
    let (outcome, damaged) = fetch_through(Box::new(move |header, wire| {
        if header.chunk == 5 && times > 0 {
            times -= 1;
            return flip(wire);
        }
        Fate::Forward(wire)
    }));
    assert!(outcome.unwrap().data() == bytes(N, 1));
    assert_eq!(damaged, 2);
}

#[test]
fn a_chunk_that_stays_damaged_leaves_the_blocks_before_it() {
    // Chunks are 1000 bytes, rows are 4 x 512: chunk 1 spoils the blocks from the second on.
    let (outcome, damaged) = fetch_through(Box::new(|header, wire| match header.chunk {
        1 => flip(wire),
        _ => Fate::Forward(wire),
    }));
    let pulled = outcome.unwrap();
    assert_eq!((pulled.first_block, pulled.n_blocks, damaged), (0, 1, 3));
    assert_eq!(pulled.shortfall, Some(TransferError::Corrupt { chunks: 1 }));
    assert!(pulled.data() == select(&bytes(N, 1), 0..1));
}

#[test]
fn when_everything_is_damaged_nothing_is_returned() {
    let (outcome, _) = fetch_through(Box::new(|_, wire| flip(wire)));
    assert!(
        matches!(outcome, Err(TransferError::Corrupt { .. })),
        "{outcome:?}"
    );
}

#[test]
fn a_cut_connection_is_replaced_and_only_the_rest_is_sent_again() {
    let (mut cut, mut seen) = (false, Vec::new());
    let (tx, rx) = channel();
    let (outcome, _) = fetch_through(Box::new(move |header, wire| {
        if header.chunk == 9 && !cut {
            cut = true;
            return Fate::Cut;
        }
        seen.push(header.chunk);
        let _ = tx.send(header.chunk);
        Fate::Forward(wire)
    }));
    assert!(outcome.unwrap().data() == bytes(N, 1));
    let passed: Vec<u32> = rx.try_iter().collect();
    assert!(passed.is_sorted(), "no chunk passed twice: {passed:?}");
}

#[test]
fn idle_connections_that_broke_without_a_word_are_replaced() {
    let mut cfg = quick();
    cfg.stripe_bytes = 1 << 12;
    let (server, client) = (start(server_config()), KvClient::new(cfg).unwrap());
    let proxy = Proxy::start(server.local_addr(), Box::new(|_, wire| Fate::Forward(wire)));
    let fetch_new = |seed| {
        let params = server.publish(&export(N, seed)).unwrap();
        fetch(&client, &proxy.divert(&params))
    };
    assert!(fetch_new(1).unwrap().data() == bytes(N, 1));
    assert!(proxy.sever() > 1);
    let n_connections = || server.stats().connections;
    eventually("only the control connection is left", || {
        n_connections() == 1
    });
    let pulled = fetch_new(2).unwrap();
    assert_eq!((pulled.n_blocks, pulled.shortfall.clone()), (N, None));
    assert!(pulled.data() == bytes(N, 2));
    assert!(n_connections() > 1);
}

#[test]
fn a_connection_cut_every_time_is_an_error() {
    let (outcome, _) = fetch_through(Box::new(|header, wire| match header.chunk {
        0..3 => Fate::Forward(wire),
        _ => Fate::Cut,
    }));
    assert!(
        matches!(outcome, Err(TransferError::Broken(_))),
        "{outcome:?}"
    );
}

#[test]
fn a_producer_that_hangs_after_acceptance_is_given_up() {
    let begun = Instant::now();
    let (outcome, _) = fetch_through(Box::new(|_, _| Fate::Stall));
    assert!(
        matches!(outcome, Err(TransferError::TimedOut { .. })),
        "{outcome:?}"
    );
    assert!(begun.elapsed() < PATIENCE);
}

#[test]
fn a_producer_that_dawdles_is_given_up_when_the_time_for_it_all_is_over() {
    let server = start(server_config());
    let mut cfg = client_config();
    cfg.total_timeout = Duration::from_millis(200);
    let client = KvClient::new(cfg).unwrap();
    let dawdle = |_: &ChunkHeader, wire| {
        std::thread::park_timeout(Duration::from_millis(40));
        Fate::Forward(wire)
    };
    let proxy = Proxy::start(server.local_addr(), Box::new(dawdle));
    let outcome = fetch(
        &client,
        &proxy.divert(&server.publish(&export(N, 1)).unwrap()),
    );
    assert!(
        matches!(outcome, Err(TransferError::TimedOut { .. })),
        "{outcome:?}"
    );
}

#[test]
fn whatever_happens_on_the_way_no_wrong_byte_gets_through_and_nothing_leaks() {
    let mut cfg = quick();
    cfg.idle_timeout = Duration::from_millis(50);
    let (server, client) = (start(server_config()), KvClient::new(cfg).unwrap());
    let mut dice = 1u64;
    let mut roll = move |sides: u64| {
        dice = dice
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (dice >> 33) % sides
    };
    let tamper = move |header: &ChunkHeader, mut wire: Vec<u8>| match roll(60) {
        0 => Fate::Cut,
        1 if roll(4) == 0 => Fate::Stall,
        2 => forge(
            &wire,
            ChunkHeader {
                chunk: header.chunk ^ 1,
                ..*header
            },
        ),
        3..8 => flip(wire),
        8 => {
            let bit = roll(8 * wire.len() as u64) as usize;
            wire[bit / 8] ^= 1 << (bit % 8);
            Fate::Forward(wire)
        }
        _ => Fate::Forward(wire),
    };
    let proxy = Proxy::start(server.local_addr(), Box::new(tamper));
    let mut whole = 0;
    for seed in 0..80 {
        let params = proxy.divert(&server.publish(&export(N, seed)).unwrap());
        let Ok(pulled) = fetch(&client, &params) else {
            continue;
        };
        assert!(pulled.data() == select(&bytes(N, seed), 0..pulled.n_blocks));
        assert_eq!(pulled.shortfall.is_none(), pulled.n_blocks == N);
        whole += usize::from(pulled.n_blocks == N);
    }
    assert!(
        (1..80).contains(&whole),
        "{whole} of 80 unharmed: the dice test nothing"
    );
    assert!(server.wait_idle(PATIENCE));
    assert_eq!(
        server.stats().expired,
        0,
        "every lease was fetched or released"
    );
    eventually("the pool is empty", || server.stats().lease_bytes == 0);
    eventually("the budget is free", || client.stats().budget_used == 0);
}

#[test]
fn forged_headers_are_refused() {
    let forgeries: [fn(&ChunkHeader) -> ChunkHeader; 6] = [
        |h| ChunkHeader { len: 1 << 20, ..*h },
        |h| ChunkHeader { len: 0, ..*h },
        |h| ChunkHeader {
            offset: u64::MAX,
            ..*h
        },
        |h| ChunkHeader {
            chunk: u32::MAX,
            ..*h
        },
        |h| ChunkHeader {
            chunk: h.chunk + 1,
            ..*h
        },
        |h| ChunkHeader {
            xfer: h.xfer + 1,
            ..*h
        },
    ];
    for forgery in forgeries {
        let (outcome, _) =
            fetch_through(Box::new(move |header, wire| forge(&wire, forgery(header))));
        let geometry = matches!(
            outcome,
            Err(TransferError::Protocol(WireError::Geometry { .. }))
        );
        assert!(geometry, "{outcome:?}");
    }
}

#[test]
fn garbage_instead_of_chunks_is_refused() {
    for garbage in [
        vec![0; 4096],
        vec![0xff; 4096],
        b"HTTP/1.1 400 Bad Request\r\n\r\n".repeat(9),
    ] {
        let (outcome, _) = fetch_through(Box::new(move |_, _| Fate::Forward(garbage.clone())));
        assert!(
            matches!(outcome, Err(TransferError::Protocol(_))),
            "{outcome:?}"
        );
    }
}

#[test]
fn a_producer_that_dies_in_mid_transfer_is_noticed() {
    let (server, client) = (start(server_config()), KvClient::new(quick()).unwrap());
    let (tx, rx) = channel();
    let proxy = Proxy::start(
        server.local_addr(),
        Box::new(move |header, wire| match header.chunk {
            0..3 => Fate::Forward(wire),
            _ => {
                let _ = tx.send(());
                Fate::Stall
            }
        }),
    );
    let params = proxy.divert(&server.publish(&export(N, 1)).unwrap());
    let held = client.hold(&params).unwrap();
    let (_guard, outcome) = start_pull(&client, &held, 0..N);
    rx.recv_timeout(PATIENCE).unwrap();
    drop(server);
    assert!(outcome.recv_timeout(PATIENCE).unwrap().is_err());
    eventually("the memory is returned", || client.stats().budget_used == 0);
}

#[test]
fn a_producer_that_is_not_there_is_an_error_at_once() {
    let server = start(server_config());
    let params = server.publish(&export(N, 1)).unwrap();
    drop(server);
    let client = KvClient::new(client_config()).unwrap();
    assert!(matches!(
        fetch(&client, &params),
        Err(TransferError::Connect(_))
    ));
}

#[test]
fn dropping_the_guard_in_mid_transfer_frees_both_sides() {
    let (server, client) = (
        start(server_config()),
        KvClient::new(client_config()).unwrap(),
    );
    let (tx, rx) = channel();
    let proxy = Proxy::start(
        server.local_addr(),
        Box::new(move |_, _| {
            let _ = tx.send(());
            Fate::Stall
        }),
    );
    let params = proxy.divert(&server.publish(&export(N, 1)).unwrap());
    let held = client.hold(&params).unwrap();
    let (guard, outcome) = start_pull(&client, &held, 0..N);
    rx.recv_timeout(PATIENCE).unwrap();
    assert!(client.stats().budget_used > 0);
    drop(guard);
    assert_eq!(
        outcome.recv_timeout(PATIENCE).unwrap().unwrap_err(),
        TransferError::Cancelled
    );
    eventually("the memory is returned", || client.stats().budget_used == 0);
    drop(held);
    assert!(server.wait_idle(PATIENCE), "the lease is released");
}

#[test]
fn a_transfer_that_still_waits_is_cancelled_too() {
    let server = start(server_config());
    let mut cfg = client_config();
    cfg.budget_bytes = layout().block_bytes() as u64;
    let client = KvClient::new(cfg).unwrap();
    let kept = fetch(&client, &server.publish(&export(1, 1)).unwrap()).unwrap();
    let held = client
        .hold(&server.publish(&export(1, 2)).unwrap())
        .unwrap();
    let (guard, outcome) = start_pull(&client, &held, 0..1);
    drop(guard);
    assert_eq!(
        outcome.recv_timeout(PATIENCE).unwrap().unwrap_err(),
        TransferError::Cancelled
    );
    drop(kept);
}

#[test]
fn a_transfer_that_waits_for_a_worker_is_cancelled_too() {
    let server = start(server_config());
    let proxy = Proxy::start(server.local_addr(), Box::new(|_, _| Fate::Stall));
    let mut cfg = client_config();
    (cfg.n_workers, cfg.idle_timeout) = (1, 2 * PATIENCE);
    let client = KvClient::new(cfg).unwrap();
    let held = client
        .hold(&proxy.divert(&server.publish(&export(N, 1)).unwrap()))
        .unwrap();
    let (_running, _) = start_pull(&client, &held, 0..N);
    let (guard, outcome) = start_pull(&client, &held, 0..N);
    drop(guard);
    assert_eq!(
        outcome.recv_timeout(PATIENCE).unwrap().unwrap_err(),
        TransferError::Cancelled
    );
}

#[test]
fn dropping_the_client_ends_what_runs_and_what_waits() {
    let server = start(server_config());
    let proxy = Proxy::start(server.local_addr(), Box::new(|_, _| Fate::Stall));
    let mut cfg = client_config();
    cfg.n_workers = 1;
    let client = KvClient::new(cfg).unwrap();
    let pulls: Vec<_> = (0..5)
        .map(|seed| {
            let params = proxy.divert(&server.publish(&export(N, seed)).unwrap());
            let held = client.hold(&params).unwrap();
            let (guard, outcome) = start_pull(&client, &held, 0..N);
            (held, guard, outcome)
        })
        .collect();
    drop(client);
    for (_held, _guard, outcome) in pulls {
        assert!(outcome.try_recv().unwrap().is_err());
    }
}

#[test]
fn two_consumers_of_one_lease_do_not_get_in_each_others_way() {
    let (server, one) = (
        start(server_config()),
        KvClient::new(client_config()).unwrap(),
    );
    let two = KvClient::new(client_config()).unwrap();
    let (tx, rx) = channel();
    let (go, gone) = channel::<()>();
    let proxy = Proxy::start(
        server.local_addr(),
        Box::new(move |header, wire| {
            if header.chunk == 3 {
                let _ = tx.send(());
                let _ = gone.recv_timeout(PATIENCE);
            }
            Fate::Forward(wire)
        }),
    );
    let params = server.publish(&export(N, 1)).unwrap();
    let held = one.hold(&proxy.divert(&params)).unwrap();
    let (_guard, outcome) = start_pull(&one, &held, 0..N);
    rx.recv_timeout(PATIENCE).unwrap();
    let refused = fetch(&two, &params);
    assert!(
        matches!(refused, Err(TransferError::Rejected(RejectCode::Busy))),
        "{refused:?}"
    );
    go.send(()).unwrap();
    assert!(outcome.recv_timeout(PATIENCE).unwrap().unwrap().data() == bytes(N, 1));
}

#[test]
fn a_callback_that_panics_does_not_stop_the_next_transfer() {
    let server = start(server_config());
    let mut cfg = client_config();
    cfg.n_workers = 1;
    let client = KvClient::new(cfg).unwrap();
    let held = client
        .hold(&server.publish(&export(1, 1)).unwrap())
        .unwrap();
    let _guard = client.pull(&held, 0, 1, Box::new(|_| panic!("on purpose")));
    assert!(fetch(&client, &server.publish(&export(1, 2)).unwrap()).is_ok());
}
