//! Hand-overs through memory that both sides see.

use crate::common::*;
use baton_kv_transfer::{KvClient, KvClientConfig, RejectCode, TransferError};

fn sharing() -> KvClientConfig {
    let mut cfg = client_config();
    cfg.shares_memory = true;
    cfg
}

#[test]
fn on_one_machine_no_byte_goes_through_a_socket() {
    let (server, client) = (start(server_config()), KvClient::new(sharing()).unwrap());
    for (n, first, count) in [(1, 0, 1), (5, 0, 5), (5, 2, 3), (7, 3, 1), (900, 1, 899)] {
        let params = server.publish(&export(n, n.into())).unwrap();
        let held = client.hold(&params).unwrap();
        let pulled = pull(&client, &held, first..first + count).unwrap();
        let expected = select(&bytes(n, n.into()), first..first + count);
        assert!(pulled.data() == expected, "{n} blocks, {first}+{count}");
    }
    assert!(server.wait_idle(PATIENCE), "every lease was consumed");
    eventually("the pool is empty", || server.stats().lease_bytes == 0);
    let (served, got) = (server.stats(), client.stats());
    assert_eq!((served.bytes_sent, got.bytes_received), (0, 0));
    let expected = (1 + 5 + 3 + 1 + 899) * layout().block_bytes() as u64;
    assert_eq!((served.bytes_lent, got.bytes_copied), (expected, expected));
    assert_eq!((served.transfers, got.complete), (5, 5));
}

#[test]
fn either_side_may_prefer_the_socket() {
    let mut cfg = server_config();
    cfg.shares_memory = false;
    let (server, client) = (start(cfg), KvClient::new(sharing()).unwrap());
    let pulled = fetch(&client, &server.publish(&export(3, 1)).unwrap()).unwrap();
    assert!(pulled.data() == bytes(3, 1));
    assert!(server.stats().bytes_sent > 0 && client.stats().bytes_copied == 0);
}

#[test]
fn shared_memory_shows_only_what_a_token_grants() {
    let (server, client) = (start(server_config()), KvClient::new(sharing()).unwrap());
    let mut params = server.publish(&export(2, 1)).unwrap();
    params.kvx.as_mut().unwrap().tok.0[0] ^= 1;
    let refused = fetch(&client, &params).unwrap_err();
    assert_eq!(refused, TransferError::Rejected(RejectCode::BadToken));
    assert_eq!(client.stats().bytes_copied, 0);
}

#[test]
fn transfers_through_memory_leave_each_other_alone() {
    let (server, client) = (start(server_config()), KvClient::new(sharing()).unwrap());
    std::thread::scope(|scope| {
        for seed in 0..8 {
            let (server, client) = (&server, &client);
            scope.spawn(move || {
                for round in 0..50 {
                    let seed = seed * 1000 + round;
                    let n = 1 + (seed % 17) as u32;
                    let pulled = fetch(client, &server.publish(&export(n, seed)).unwrap()).unwrap();
                    assert!(pulled.data() == bytes(n, seed));
                }
            });
        }
    });
    assert!(server.wait_idle(PATIENCE));
    assert_eq!(client.stats().bytes_received, 0);
}
