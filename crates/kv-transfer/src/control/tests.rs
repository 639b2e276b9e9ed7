//! A consumer with the right to it gets what a lease has, and nobody else anything.

use super::*;
use crate::geometry::tests::{selection, shard};
use crate::lease::LeaseTerms;
use proptest::prelude::*;

impl Placed for () {
    fn place(&self) -> Place {
        Place {
            mark: 0,
            stamp: 1,
            offset: 0,
        }
    }
}

const SECOND: Duration = Duration::from_secs(1);
const LEASE: u64 = 42;

struct Bed {
    control: Control<()>,
    leases: LeaseTable<()>,
    now: Instant,
    token: [u8; 32],
}

impl Bed {
    fn new() -> Self {
        let terms = Terms {
            secret: Secret::new(&[1; 32]).unwrap(),
            ours: shard(),
            boot_id: 1,
            fingerprint: 2,
            chunk_bytes: 64,
            max_streams: 2,
            starvation: 5 * SECOND,
        };
        let now = Instant::now();
        let mut leases = LeaseTable::new(LeaseTerms {
            ttl: 15 * SECOND,
            cap: 600 * SECOND,
        });
        leases.begin(LEASE, 2, now);
        assert!(leases.append(LEASE, (), 2, now));
        let token = terms.secret.lease_token(&terms.claim(LEASE), [3; 16]).0;
        let mut control = Control::new(SessionId(1), Arc::new(terms));
        assert_eq!(control.attach(), Some(1));
        Self {
            control,
            leases,
            now,
            token,
        }
    }

    fn terms_token(&self, lease: u64) -> [u8; 32] {
        let terms = &self.control.terms;
        terms.secret.lease_token(&terms.claim(lease), [3; 16]).0
    }

    fn say(&mut self, message: Message) -> Option<Message> {
        self.control
            .on_message((1, message), &mut self.leases, self.now)
            .unwrap()
    }

    fn open(&self) -> Open {
        Open {
            xfer: 9,
            lease: LEASE,
            token: self.token,
            selection: selection(0..2),
            credit: 128,
            want: vec![],
        }
    }

    fn release(&self, lease: u64) -> Message {
        let token = LeaseToken(self.terms_token(lease));
        Message::Release { lease, token }
    }

    fn work(&mut self) -> Work<()> {
        self.control.work(1, &mut self.leases, self.now)
    }

    fn refusal(&mut self, open: Open) -> RejectCode {
        match self.say(Message::Open(open)) {
            Some(Message::Reject { code, .. }) => code,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_transfer_runs_on_credit_and_consumes_its_lease() {
    let mut bed = Bed::new();
    let accept = bed.say(Message::Open(bed.open()));
    let expected = Message::Accept {
        xfer: 9,
        chunk_bytes: 64,
        total_chunks: 12,
        total_bytes: 768,
    };
    assert_eq!(accept, Some(expected));
    assert!(matches!(bed.work(), Work::Send(Chunk { chunk: 0, .. })));
    assert!(matches!(bed.work(), Work::Send(Chunk { chunk: 1, .. })));
    assert!(matches!(bed.work(), Work::Idle));
    bed.now += SECOND;
    bed.say(Message::Credit { xfer: 9, bytes: 64 });
    let third = bed.work();
    assert!(matches!(
        third,
        Work::Send(Chunk {
            chunk: 2,
            stalled: SECOND,
            ..
        })
    ));
    assert_eq!(bed.say(Message::Received { xfer: 9 }), None);
    assert!(matches!(bed.work(), Work::Idle));
    let released = Message::Released { lease: LEASE };
    assert_eq!(bed.say(bed.release(LEASE)), Some(released));
    assert_eq!(bed.refusal(bed.open()), RejectCode::Consumed);
}

#[test]
fn a_growing_lease_is_fetched_part_by_part() {
    let mut bed = Bed::new();
    let token = bed.terms_token(LEASE + 1);
    bed.leases.begin(LEASE + 1, 3, bed.now);
    let watch = Message::Watch {
        lease: LEASE + 1,
        token: LeaseToken(token),
    };
    assert_eq!(bed.say(watch), None);
    assert_eq!(bed.control.tell(&bed.leases), []);
    assert!(bed.leases.append(LEASE + 1, (), 2, bed.now));
    let ready = |n_tokens| Message::Ready {
        lease: LEASE + 1,
        n_tokens,
    };
    assert_eq!(bed.control.tell(&bed.leases), [ready(4)]);
    assert_eq!(bed.control.tell(&bed.leases), []);
    let open = |xfer, blocks| Open {
        xfer,
        lease: LEASE + 1,
        token,
        selection: selection(blocks),
        credit: 1000,
        want: vec![],
    };
    let accepted = |answer| match answer {
        Some(Message::Accept { total_bytes, .. }) => total_bytes,
        other => panic!("{other:?}"),
    };
    assert_eq!(accepted(bed.say(Message::Open(open(1, 0..2)))), 768);
    assert_eq!(bed.say(Message::Received { xfer: 1 }), None);
    assert_eq!(bed.refusal(open(2, 1..3)), RejectCode::Range);
    assert!(bed.leases.append(LEASE + 1, (), 1, bed.now));
    assert_eq!(bed.control.tell(&bed.leases), [ready(6)]);
    assert_eq!(accepted(bed.say(Message::Open(open(3, 1..3)))), 768);
    assert_eq!(bed.say(Message::Received { xfer: 3 }), None);
    let released = Message::Released { lease: LEASE + 1 };
    assert_eq!(bed.say(bed.release(LEASE + 1)), Some(released.clone()));
    let watch = Message::Watch {
        lease: LEASE + 1,
        token: LeaseToken(token),
    };
    assert_eq!(bed.say(watch), None);
    assert_eq!(bed.control.tell(&bed.leases), [released]);
    let forged = Message::Watch {
        lease: LEASE,
        token: LeaseToken([0; 32]),
    };
    assert_eq!(bed.say(forged), Some(Message::Released { lease: LEASE }));
}

#[test]
fn what_cannot_be_granted_is_refused_with_its_reason() {
    let mut bed = Bed::new();
    let open = bed.open();
    let unknown = Open {
        lease: 1,
        ..bed.open()
    };
    assert_eq!(bed.refusal(unknown), RejectCode::UnknownLease);
    let forged = Open {
        token: [0; 32],
        ..bed.open()
    };
    assert_eq!(bed.refusal(forged), RejectCode::BadToken);
    for blocks in [0..0, 0..3, 2..3, u32::MAX - 1..u32::MAX, 1..u32::MAX] {
        let selection = selection(blocks);
        let open = Open {
            selection,
            ..bed.open()
        };
        assert_eq!(bed.refusal(open), RejectCode::Range);
    }
    let odd = Open {
        want: vec![1],
        ..bed.open()
    };
    assert_eq!(bed.refusal(odd), RejectCode::Range);
    bed.say(Message::Open(open.clone()));
    assert_eq!(
        bed.refusal(Open { xfer: 10, ..open }),
        RejectCode::Busy,
        "the stream"
    );
}

#[test]
fn a_cancelled_transfer_is_acknowledged_after_its_last_byte_and_can_be_opened_again() {
    let mut bed = Bed::new();
    bed.say(Message::Open(bed.open()));
    assert_eq!(bed.say(Message::Cancel { xfer: 9 }), None);
    assert!(matches!(
        bed.work(),
        Work::Say(Message::Cancelled { xfer: 9 })
    ));
    let again = bed.say(Message::Open(bed.open()));
    assert!(matches!(again, Some(Message::Accept { .. })));
    assert_eq!(
        bed.say(Message::Cancel { xfer: 8 }),
        Some(Message::Cancelled { xfer: 8 })
    );
}

#[test]
fn a_loan_ends_with_its_lease_whatever_its_consumer_says() {
    let mut bed = Bed::new();
    assert!(bed.control.show_memory());
    let (open, now) = (Message::Open(bed.open()), bed.now);
    let lent = bed
        .control
        .on_message((MEMORY, open), &mut bed.leases, now)
        .unwrap();
    assert!(matches!(lent, Some(Message::Lent(_))));
    assert!(bed.control.tell(&bed.leases).is_empty());
    assert_eq!(bed.control.leases_open().count(), 1);
    bed.leases.expire(bed.now + 15 * SECOND);
    assert!(bed.control.tell(&bed.leases).is_empty());
    assert_eq!(bed.control.leases_open().count(), 0);
}

#[test]
fn a_transfer_whose_lease_ends_is_stopped_with_the_reason() {
    let mut bed = Bed::new();
    bed.say(Message::Open(bed.open()));
    bed.now += 15 * SECOND;
    bed.leases.expire(bed.now);
    let stop = Message::Reject {
        xfer: 9,
        code: RejectCode::Expired,
    };
    assert!(matches!(bed.work(), Work::Say(message) if message == stop));
}

#[test]
fn a_consumer_that_grants_nothing_loses_its_connection_and_frees_the_lease() {
    let mut bed = Bed::new();
    bed.say(Message::Open(Open {
        credit: 0,
        ..bed.open()
    }));
    assert!(matches!(bed.work(), Work::Idle));
    bed.now += 6 * SECOND;
    assert!(matches!(bed.work(), Work::Close));
    bed.control.detach(1, &mut bed.leases);
    assert_eq!(bed.leases.refusal(LEASE, SessionId(2), bed.now), None);
}

#[test]
fn data_connections_are_bounded() {
    let mut bed = Bed::new();
    assert_eq!(bed.control.attach(), Some(2));
    assert_eq!(bed.control.attach(), None);
    bed.control.detach(1, &mut bed.leases);
    assert_eq!(bed.control.attach(), Some(3));
}

#[test]
fn heartbeats_are_answered_for_live_and_gone_leases() {
    let mut bed = Bed::new();
    let held = |lease| (lease, LeaseToken(bed.terms_token(lease)));
    let leases = vec![held(LEASE), held(1)];
    let ack = bed.say(Message::Heartbeat { leases });
    let remaining_ms = vec![(LEASE, 15_000), (1, 0)];
    assert_eq!(ack, Some(Message::HeartbeatAck { remaining_ms }));
}

#[test]
fn who_has_no_right_to_a_lease_neither_ends_nor_prolongs_it() {
    let mut bed = Bed::new();
    let (lease, token) = (LEASE, LeaseToken(bed.terms_token(LEASE + 1)));
    let released = Message::Released { lease };
    assert_eq!(bed.say(Message::Release { lease, token }), Some(released));
    bed.now += 14 * SECOND;
    let leases = vec![(lease, token)];
    let remaining_ms = vec![(lease, 0)];
    assert_eq!(
        bed.say(Message::Heartbeat { leases }),
        Some(Message::HeartbeatAck { remaining_ms })
    );
    assert_eq!(bed.leases.refusal(LEASE, SessionId(2), bed.now), None);
    assert_eq!(bed.leases.expire(bed.now + SECOND), 1);
}

#[test]
fn a_transfer_on_a_connection_that_has_ended_is_refused_as_such() {
    let mut bed = Bed::new();
    bed.control.detach(1, &mut bed.leases);
    assert_eq!(bed.refusal(bed.open()), RejectCode::Disconnected);
}

proptest! {
    #[test]
    fn no_sequence_of_messages_sends_more_than_was_granted(
        script in prop::collection::vec((0u8..7, 0u32..14, 0u64..200), 0..60),
    ) {
        let mut bed = Bed::new();
        let (mut granted, mut sent) = (0, 0);
        for (what, chunk, bytes) in script {
            let answer = match what {
                0 => bed.say(Message::Open(Open { credit: bytes, ..bed.open() })),
                1 => bed.say(Message::Credit { xfer: 9, bytes }),
                2 => bed.say(Message::Nack { xfer: 9, chunk }),
                3 => bed.say(Message::Cancel { xfer: 9 }),
                4 => bed.say(Message::Ping { id: bytes }),
                _ => {
                    if let Work::Send(chunk) = bed.work() {
                        sent += chunk.range.len() as u64;
                    }
                    None
                }
            };
            if matches!(answer, Some(Message::Accept { .. })) || what == 1 {
                granted += bytes;
            }
            prop_assert!(sent <= granted);
        }
    }
}
