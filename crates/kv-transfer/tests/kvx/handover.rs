//! Hand-overs over real loopback sockets where both sides behave: bytes, leases, limits.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use crate::common::*;
use baton_kv::{DType, KvLayout, KvTransferParams, LeaseToken};
use baton_kv_transfer::{
    Export, KvClient, PeerPolicy, PublishError, RejectCode, Secret, TransferError,
};

fn rejected(outcome: Outcome) -> RejectCode {
    match outcome {
        Err(TransferError::Rejected(code)) => code,
        other => panic!("not a refusal: {other:?}"),
    }
}

fn with_token(params: &KvTransferParams, tok: LeaseToken) -> KvTransferParams {
    let mut params = params.clone();
    params.kvx.as_mut().unwrap().tok = tok;
    params
}

#[test]
fn every_range_of_blocks_arrives_byte_for_byte() {
    let plain_and_encrypted = [false, true].into_iter();
    for (tls, chunk_bytes) in plain_and_encrypted
        .flat_map(|tls| [1, 100, 512, 1000, 1 << 20].map(|chunk_bytes| (tls, chunk_bytes)))
    {
        let (mut cfg, client) = configs(tls);
        cfg.chunk_bytes = chunk_bytes;
        let (server, client) = (start(cfg), KvClient::new(client).unwrap());
        for (n, first, count) in [(1, 0, 1), (5, 0, 5), (5, 2, 3), (7, 3, 1), (9, 0, 4)] {
            if chunk_bytes == 1 && n > 1 {
                continue;
            }
            let params = server.publish(&export(n, n.into())).unwrap();
            let held = client.hold(&params).unwrap();
            assert_eq!((held.n_blocks(), held.n_tokens()), (n, n * 4 - 1));
            let pulled = pull(&client, &held, first..first + count).unwrap();
            assert_eq!((pulled.first_block, pulled.n_blocks), (first, count));
            assert_eq!(pulled.shortfall, None);
            let expected = select(&bytes(n, n.into()), first..first + count);
            assert!(
                pulled.data() == expected,
                "{n} blocks, {first}+{count}, chunk {chunk_bytes}"
            );
        }
        assert!(server.wait_idle(PATIENCE), "every lease was consumed");
        eventually("the pool is empty", || server.stats().lease_bytes == 0);
        eventually("the client's memory is returned", || {
            client.stats().budget_used == 0
        });
    }
}

#[test]
fn a_long_transfer_needs_credit_again_and_again() {
    for tls in [false, true] {
        let (mut cfg, client) = configs(tls);
        cfg.chunk_bytes = 1 << 20;
        let (server, client) = (start(cfg), KvClient::new(client).unwrap());
        // Twice the window, which is never below two chunks of the longest kind.
        let n = (40 << 20) / layout().block_bytes() as u32;
        let params = server.publish(&export(n, 3)).unwrap();
        let pulled = fetch(&client, &params).unwrap();
        assert!(pulled.data() == bytes(n, 3));
    }
}

#[test]
fn a_hundred_transfers_run_at_the_same_time() {
    [false, true].into_iter().for_each(a_hundred_transfers);
}

fn a_hundred_transfers(tls: bool) {
    let (server, client) = configs(tls);
    let (server, client) = (start(server), KvClient::new(client).unwrap());
    let running: Vec<_> = (0..100)
        .map(|seed| {
            let params = server.publish(&export(3, seed)).unwrap();
            let held = client.hold(&params).unwrap();
            let (guard, rx) = start_pull(&client, &held, 0..3);
            (seed, held, guard, rx)
        })
        .collect();
    for (seed, _held, _guard, rx) in running {
        let pulled = rx.recv_timeout(PATIENCE).unwrap().unwrap();
        assert!(pulled.data() == bytes(3, seed));
    }
    assert!(server.wait_idle(PATIENCE));
    eventually("both have counted", || {
        (server.stats().transfers, client.stats().complete) == (100, 100)
    });
}

#[test]
fn a_lease_is_fetched_once() {
    let (server, client) = (
        start(server_config()),
        KvClient::new(client_config()).unwrap(),
    );
    let params = server.publish(&export(2, 1)).unwrap();
    fetch(&client, &params).unwrap();
    assert!(server.wait_idle(PATIENCE));
    assert_eq!(rejected(fetch(&client, &params)), RejectCode::Consumed);
    assert_eq!(server.stats().rejected(RejectCode::Consumed), 1);
}

#[test]
fn an_expired_lease_yields_nothing() {
    let mut cfg = server_config();
    cfg.lease_ttl = Duration::from_millis(20);
    let (server, client) = (start(cfg), KvClient::new(client_config()).unwrap());
    let params = server.publish(&export(2, 1)).unwrap();
    assert!(server.wait_idle(PATIENCE));
    assert_eq!((server.stats().expired, server.stats().lease_bytes), (1, 0));
    assert_eq!(rejected(fetch(&client, &params)), RejectCode::Expired);
}

#[test]
fn heartbeats_keep_a_lease_beyond_its_ttl() {
    let mut cfg = server_config();
    cfg.lease_ttl = Duration::from_secs(2);
    let (server, client) = (start(cfg), KvClient::new(client_config()).unwrap());
    let params = server.publish(&export(2, 1)).unwrap();
    let published = Instant::now();
    let held = client.hold(&params).unwrap();
    eventually("the ttl has passed", || {
        published.elapsed() > Duration::from_millis(2500)
    });
    assert!(server.stats().heartbeats > 0);
    assert!(pull(&client, &held, 0..2).is_ok());
}

#[test]
fn a_held_lease_is_released_when_the_last_holder_lets_go() {
    let (server, client) = (
        start(server_config()),
        KvClient::new(client_config()).unwrap(),
    );
    let params = server.publish(&export(2, 1)).unwrap();
    let (one, two) = (client.hold(&params).unwrap(), client.hold(&params).unwrap());
    drop(one);
    eventually("the connection is up", || server.stats().heartbeats > 0);
    assert_eq!((server.stats().leases, client.stats().held), (1, 1));
    drop(two);
    assert!(server.wait_idle(PATIENCE));
    assert_eq!((server.stats().expired, client.stats().held), (0, 0));
}

#[test]
fn a_transfer_that_says_it_is_over_holds_nothing() {
    let server = start(server_config());
    let client = Arc::new(KvClient::new(client_config()).unwrap());
    let params = server.publish(&export(2, 1)).unwrap();
    let held = client.hold(&params).unwrap();
    let (tx, rx) = channel();
    let (go, gone) = channel::<()>();
    let asked = Arc::downgrade(&client);
    let done = Box::new(move |result: Outcome| {
        let is_whole = result.is_ok_and(|pulled| !pulled.more);
        let _ = gone.recv_timeout(PATIENCE);
        let _ = tx.send(
            asked
                .upgrade()
                .map(|client| (is_whole, client.stats().held)),
        );
    });
    let _guard = client.pull(&held, 0, 2, done);
    drop(held);
    go.send(()).unwrap();
    assert_eq!(rx.recv_timeout(PATIENCE).unwrap(), Some((true, 0)));
}

#[test]
fn a_lease_can_be_withdrawn_by_its_owner() {
    let (server, client) = (
        start(server_config()),
        KvClient::new(client_config()).unwrap(),
    );
    let params = server.publish(&export(2, 1)).unwrap();
    assert!(server.release(params.uuid));
    assert!(!server.release(params.uuid));
    assert_eq!(rejected(fetch(&client, &params)), RejectCode::Consumed);
}

#[test]
fn wrong_tokens_unknown_leases_and_other_boots_are_refused() {
    let (server, client) = (
        start(server_config()),
        KvClient::new(client_config()).unwrap(),
    );
    let params = server.publish(&export(2, 1)).unwrap();
    let forged = with_token(&params, LeaseToken([7; 32]));
    assert_eq!(rejected(fetch(&client, &forged)), RejectCode::BadToken);
    let unknown = KvTransferParams {
        uuid: params.uuid ^ 1,
        ..params.clone()
    };
    assert_eq!(rejected(fetch(&client, &unknown)), RejectCode::UnknownLease);
    // Who held it without a right and let go has not ended it, and cannot come in between who has the right.
    let held = client.hold(&params).unwrap();
    let refused = client.hold(&forged).unwrap_err();
    assert_eq!(refused, TransferError::Rejected(RejectCode::BadToken));
    assert!(pull(&client, &held, 0..2).unwrap().data() == bytes(2, 1));
    drop(held);
    let (addr, other) = (server.local_addr(), client);
    drop(server);
    let mut cfg = server_config();
    cfg.bind = addr;
    let _restarted = start(cfg);
    drop(other);
    let client = KvClient::new(client_config()).unwrap();
    assert_eq!(rejected(fetch(&client, &params)), RejectCode::UnknownLease);
}

#[test]
fn a_consumer_with_another_secret_gets_nowhere() {
    let server = start(server_config());
    let params = server.publish(&export(2, 1)).unwrap();
    let mut cfg = client_config();
    cfg.secret = Secret::new(&[1; 32]).unwrap();
    let client = KvClient::new(cfg).unwrap();
    assert_eq!(rejected(fetch(&client, &params)), RejectCode::Unauthorized);
    assert_eq!(server.stats().leases, 1);
}

#[test]
fn what_cannot_fit_is_refused_before_anything_is_sent() {
    let server = start(server_config());
    let params = server.publish(&export(2, 1)).unwrap();
    let mismatch = |layout: KvLayout| {
        let mut cfg = client_config();
        cfg.layout = layout;
        match KvClient::new(cfg).unwrap().hold(&params) {
            Err(TransferError::Mismatch { what, .. }) => what,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(
        mismatch(KvLayout {
            dtype: DType::BF16,
            ..layout()
        }),
        "element type"
    );
    assert_eq!(
        mismatch(KvLayout {
            n_layers: 5,
            ..layout()
        }),
        "model"
    );
    assert_eq!(
        mismatch(KvLayout {
            model_fingerprint: 8,
            ..layout()
        }),
        "model"
    );
    let client = KvClient::new(client_config()).unwrap();
    let hold = |params: &KvTransferParams| client.hold(params).unwrap_err();
    assert_eq!(hold(&params.client_view()), TransferError::ForeignProducer);
    let short = KvTransferParams {
        remote_block_ids: vec![1],
        ..params.clone()
    };
    assert_eq!(hold(&short), TransferError::Range);
    assert_eq!(server.stats().connections, 0);
}

#[test]
fn only_allowed_producers_are_connected_to() {
    let server = start(server_config());
    let params = server.publish(&export(2, 1)).unwrap();
    let client = KvClient::new(client_config()).unwrap();
    let elsewhere = KvTransferParams {
        remote_host: "192.0.2.1".into(),
        ..params.clone()
    };
    assert!(matches!(
        client.hold(&elsewhere),
        Err(TransferError::Forbidden { .. })
    ));
    let metadata = KvTransferParams {
        remote_host: "metadata.internal".into(),
        ..params.clone()
    };
    assert!(matches!(
        client.hold(&metadata),
        Err(TransferError::Forbidden { .. })
    ));
    let mut cfg = client_config();
    let port = params.remote_port;
    cfg.peers = PeerPolicy::Allow(Arc::new(move |host, p| host == "127.0.0.1" && p != port));
    let picky = KvClient::new(cfg).unwrap();
    assert!(matches!(
        picky.hold(&params),
        Err(TransferError::Forbidden { .. })
    ));
    assert!(client.hold(&params).is_ok());
}

#[test]
fn the_pool_is_bounded_and_refills() {
    let mut cfg = server_config();
    cfg.pool_bytes = 3 * layout().block_bytes() as u64;
    let server = start(cfg);
    let params = server.publish(&export(2, 1)).unwrap();
    assert!(matches!(
        server.publish(&export(2, 1)),
        Err(PublishError::PoolFull { .. })
    ));
    server.release(params.uuid);
    assert!(server.publish(&export(3, 1)).is_ok());
}

#[test]
fn an_export_that_contradicts_itself_is_refused() {
    let server = start(server_config());
    let mut short = export(2, 1);
    short.data.pop();
    let mut long = export(2, 1);
    long.n_tokens = 100;
    let empty = Export {
        blocks: vec![],
        n_tokens: 0,
        data: vec![],
    };
    for bad in [short, long, empty] {
        assert!(matches!(
            server.publish(&bad),
            Err(PublishError::Shape { .. })
        ));
    }
}

#[test]
fn a_draining_server_serves_what_it_has_and_takes_nothing_new() {
    let (server, client) = (
        start(server_config()),
        KvClient::new(client_config()).unwrap(),
    );
    let params = server.publish(&export(2, 1)).unwrap();
    server.drain();
    assert_eq!(
        server.publish(&export(2, 1)).unwrap_err(),
        PublishError::Draining
    );
    assert!(!server.wait_idle(Duration::ZERO));
    assert!(fetch(&client, &params).is_ok());
    assert!(server.wait_idle(PATIENCE));
}

#[test]
fn ranges_outside_the_lease_and_transfers_beyond_the_budget_are_refused() {
    let server = start(server_config());
    let params = server.publish(&export(3, 1)).unwrap();
    let mut cfg = client_config();
    cfg.budget_bytes = 2 * layout().block_bytes() as u64;
    let client = KvClient::new(cfg).unwrap();
    let held = client.hold(&params).unwrap();
    for blocks in [0..0, 0..4, 3..4, u32::MAX - 1..u32::MAX] {
        assert_eq!(
            pull(&client, &held, blocks).unwrap_err(),
            TransferError::Range
        );
    }
    assert!(matches!(
        pull(&client, &held, 0..3),
        Err(TransferError::TooLarge { .. })
    ));
    assert_eq!(
        pull(&client, &held, 1..3).unwrap().data(),
        select(&bytes(3, 1), 1..3)
    );
}

#[test]
fn transfers_wait_for_memory_that_the_caller_still_has() {
    let server = start(server_config());
    let mut cfg = client_config();
    cfg.budget_bytes = 3 * layout().block_bytes() as u64;
    let client = KvClient::new(cfg).unwrap();
    let first = fetch(&client, &server.publish(&export(2, 1)).unwrap()).unwrap();
    let held = client
        .hold(&server.publish(&export(2, 2)).unwrap())
        .unwrap();
    let (_guard, rx) = start_pull(&client, &held, 0..2);
    assert!(rx.try_recv().is_err());
    drop(first);
    assert!(rx.recv_timeout(PATIENCE).unwrap().unwrap().data() == bytes(2, 2));
}

#[test]
fn the_queue_of_transfers_is_bounded() {
    let server = start(server_config());
    let mut cfg = client_config();
    (cfg.max_queued, cfg.max_held) = (0, 1);
    let client = KvClient::new(cfg).unwrap();
    let params = server.publish(&export(2, 1)).unwrap();
    let held = client.hold(&params).unwrap();
    let busy = TransferError::Busy {
        what: "queued transfers",
    };
    assert_eq!(pull(&client, &held, 0..2).unwrap_err(), busy);
    assert_eq!(
        client.hold(&params).unwrap_err(),
        TransferError::Busy { what: "leases" }
    );
}

#[test]
fn a_long_transfer_uses_several_connections_and_a_short_one_does_not() {
    [false, true].into_iter().for_each(long_and_short);
}

fn long_and_short(tls: bool) {
    let (server, mut cfg) = configs(tls);
    cfg.stripe_bytes = 10 * layout().block_bytes();
    let (server, client) = (start(server), KvClient::new(cfg).unwrap());
    let connections = || server.stats().connections;
    let pulled = fetch(&client, &server.publish(&export(15, 1)).unwrap()).unwrap();
    assert!(pulled.data() == bytes(15, 1));
    assert_eq!(connections(), 2, "one for control, one for data");
    let pulled = fetch(&client, &server.publish(&export(35, 2)).unwrap()).unwrap();
    assert!(pulled.data() == bytes(35, 2));
    // A stripe may be done before another begins, and leave it its connection.
    assert!((2..=4).contains(&connections()));
    // Many at the same time share what connections there may be.
    std::thread::scope(|scope| {
        for seed in 0..8 {
            let (server, client) = (&server, &client);
            scope.spawn(move || {
                let pulled = fetch(client, &server.publish(&export(90, seed)).unwrap()).unwrap();
                assert!(pulled.data() == bytes(90, seed));
            });
        }
    });
    assert!((3..=5).contains(&connections()));
    eventually("every lease was consumed", || {
        server.stats().transfers == 10
    });
}
