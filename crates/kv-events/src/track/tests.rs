//! Stories of one source, and a source whose connections, answers and life are cut at random.

use super::*;
use proptest::prelude::*;

const NOW: Duration = Duration::from_secs(1000);

/// Batch `seq` of the source's `life`-th life.
fn batch(life: u8, seq: u64) -> Numbered {
    let mut payload = vec![life];
    payload.extend(seq.to_be_bytes());
    Numbered {
        seq,
        payload: payload.into(),
    }
}

/// Actions in short: `D1.7` delivers batch 7 of the first life, `A3` asks from 3 on, `R` resets.
fn did(track: &mut Track) -> String {
    let short = |action: Action| match action {
        Action::Reset => "R".to_owned(),
        Action::Replay(from) => format!("A{from}"),
        Action::Deliver(payload) => {
            let seq = u64::from_be_bytes(*payload[1..].first_chunk().unwrap());
            format!("D{}.{seq}", payload[0])
        }
    };
    track.actions().map(short).collect::<Vec<_>>().join(" ")
}

/// A step of a story: `c`onnected, `x` lost, `e`nd of a replay, `f`ailure of one, `t`ick after the cool-down;
/// `l1.7` live, `r1.7` replayed.
fn play(track: &mut Track, story: &str) -> String {
    let mut done = Vec::new();
    for step in story.split_whitespace() {
        let of = |text: &str| {
            let (life, seq) = text.split_once('.').unwrap();
            batch(life.parse().unwrap(), seq.parse().unwrap())
        };
        match (&step[..1], &step[1..]) {
            ("c", _) => track.connected(NOW),
            ("x", _) => track.lost(),
            ("e", _) => track.replay_ended(NOW),
            ("f", _) => track.replay_failed(NOW),
            ("t", _) => track.tick(NOW + COOL_DOWN),
            ("l", text) => track.live(NOW, of(text)),
            ("r", text) => track.replayed(of(text)),
            _ => panic!("{step}"),
        }
        done.push(did(track));
    }
    done.retain(|d| !d.is_empty());
    done.join(" ")
}

/// Story, what is done, and what it is about.
const WITH_REPLAY: &[(&str, &str, &str)] = &[
    (
        "c e l1.0 l1.1",
        "A0 D1.0 D1.1",
        "a source that has said nothing yet",
    ),
    (
        "c r1.0 r1.1 e l1.2",
        "A0 D1.0 D1.1 D1.2",
        "a source with a past",
    ),
    (
        "c r1.7 r1.8 e l1.9",
        "A0 D1.7 D1.8 D1.9",
        "whose beginning is forgotten",
    ),
    (
        "c l1.1 r1.0 r1.1 l1.2 e",
        "A0 D1.0 D1.1 D1.2",
        "live ones wait, known ones are dropped",
    ),
    (
        "c r1.0 r1.1 e l1.1 l1.2",
        "A0 D1.0 D1.1 D1.2",
        "a replay may be faster than live",
    ),
    ("c e l1.0 l1.0 l1.1", "A0 D1.0 D1.1", "the same twice"),
    (
        "c e l1.0 l1.3 r1.1 r1.2 r1.3 e l1.4",
        "A0 D1.0 A1 D1.1 D1.2 D1.3 D1.4",
        "a hole that is filled",
    ),
    (
        "c e l1.0 l1.3 l1.4 r1.2 e",
        "A0 D1.0 A1 R D1.2 D1.3 D1.4",
        "a hole that is not to be filled",
    ),
    ("c e l1.0 l1.3 e", "A0 D1.0 A1 R D1.3", "nor by anything"),
    (
        "c e l1.0 l1.5 r1.1 r1.3 r1.2 r1.3 r1.4 e",
        "A0 D1.0 A1 D1.1 A2 D1.2 D1.3 D1.4 D1.5",
        "an answer with a hole",
    ),
    (
        "c r1.0 r1.1 f r1.2 e",
        "A0 D1.0 D1.1 A2 D1.2",
        "an answer that breaks off",
    ),
    (
        "c r1.0 r1.1 f e l1.2",
        "A0 D1.0 D1.1 A2 D1.2",
        "that had all but its end",
    ),
    (
        "c e l1.0 x c r1.0 e l1.1",
        "A0 D1.0 A0 D1.1",
        "the same source after a break",
    ),
    (
        "c e l1.0 l1.1 x c r1.1 r1.2 e l1.3",
        "A0 D1.0 D1.1 A1 D1.2 D1.3",
        "that has gone on meanwhile",
    ),
    (
        "c e l1.0 l1.1 x c r1.5 r1.6 e",
        "A0 D1.0 D1.1 A1 R D1.5 D1.6",
        "further than it remembers",
    ),
    (
        "c e l1.0 l1.1 x c e r2.0 e l2.1",
        "A0 D1.0 D1.1 A1 R A0 D2.0 D2.1",
        "started anew, and not as far yet",
    ),
    (
        "c e l1.0 l1.1 x c r2.1 r2.0 r2.1 e",
        "A0 D1.0 D1.1 A1 R A0 D2.0 D2.1",
        "started anew, and further already",
    ),
    (
        "c e l1.0 l1.1 l2.0 r2.0 e l2.1",
        "A0 D1.0 D1.1 R A0 D2.0 D2.1",
        "started anew behind a proxy",
    ),
];

#[test]
fn stories_with_replay() {
    for (story, expected, what) in WITH_REPLAY {
        assert_eq!(
            play(&mut Track::new(true), story),
            *expected,
            "{what}: {story}"
        );
    }
}

/// Story, what is done, and what it is about.
const WITHOUT_ANSWERS: &[(&str, &str, &str)] = &[
    ("c f f f l1.4 l1.5", "A0 A0 A0 D1.4 D1.5", "nobody answers"),
    (
        "c l1.4 f f f l1.5",
        "A0 A0 A0 D1.4 D1.5",
        "while live ones wait",
    ),
    (
        "c f f f l1.4 l1.9 l1.10",
        "A0 A0 A0 D1.4 R D1.9 D1.10",
        "holes while it is left alone",
    ),
    (
        "c f f f l1.4 t r1.3 r1.4 l1.5 e",
        "A0 A0 A0 D1.4 A0 R D1.3 D1.4 D1.5",
        "made good later",
    ),
    (
        "c f f f l1.4 t f f f l1.5",
        "A0 A0 A0 D1.4 A0 A0 A0 D1.5",
        "or not",
    ),
    (
        "c f f f l1.4 x c l1.5",
        "A0 A0 A0 D1.4 D1.5",
        "a break in which nothing was said",
    ),
    (
        "c f f f l1.4 x c l1.6",
        "A0 A0 A0 D1.4 R D1.6",
        "and one in which something was",
    ),
    (
        "c e l1.0 x c f f f l1.1",
        "A0 D1.0 A0 A0 A0 D1.1",
        "no check, and no sign of change",
    ),
    (
        "c e l1.0 x c f f f l2.0",
        "A0 D1.0 A0 A0 A0 R D2.0",
        "no check, and a change",
    ),
];

#[test]
fn stories_where_replays_fail() {
    for (story, expected, what) in WITHOUT_ANSWERS {
        assert_eq!(
            play(&mut Track::new(true), story),
            *expected,
            "{what}: {story}"
        );
    }
}

/// Story, what is done, and what it is about.
const WITHOUT_REPLAY: &[(&str, &str, &str)] = &[
    ("c l1.3 l1.4", "D1.3 D1.4", "in the middle"),
    ("c l1.3 l1.5 l1.6", "D1.3 R D1.5 D1.6", "a hole"),
    (
        "c l1.3 l1.4 x c l1.5",
        "D1.3 D1.4 D1.5",
        "a break in which nothing was said",
    ),
    (
        "c l1.3 l1.4 x c l1.9",
        "D1.3 D1.4 R D1.9",
        "one in which something was",
    ),
    ("c l1.3 x c l2.0 l2.1", "D1.3 R D2.0 D2.1", "started anew"),
    (
        "c l1.3 l2.0 l2.1",
        "D1.3 R D2.0 D2.1",
        "started anew behind a proxy",
    ),
    ("c l1.3 l1.3", "D1.3", "the same twice"),
    (
        "c l1.18446744073709551615 l1.18446744073709551615",
        "D1.18446744073709551615",
        "the largest number",
    ),
];

#[test]
fn stories_without_replay() {
    for (story, expected, what) in WITHOUT_REPLAY {
        assert_eq!(
            play(&mut Track::new(false), story),
            *expected,
            "{what}: {story}"
        );
    }
}

#[test]
fn a_source_that_cannot_answer_is_asked_again_when_it_has_been_left_alone() {
    let mut track = Track::new(true);
    assert_eq!(track.wakes_at(), None);
    play(&mut track, "c f f f l1.4");
    assert_eq!(track.wakes_at(), Some(NOW + COOL_DOWN));
    track.tick(NOW);
    assert_eq!(did(&mut track), "");
    play(&mut track, "x");
    assert_eq!(track.wakes_at(), None);
}

#[test]
fn what_waits_is_bounded_and_a_hole_where_it_was_dropped() {
    let mut track = Track::new(true);
    play(&mut track, "c");
    let big = |seq| Numbered {
        seq,
        payload: vec![0; MAX_HELD / 4].into(),
    };
    (0..9).for_each(|seq| track.live(NOW, big(seq)));
    assert!(track.held_bytes <= MAX_HELD && track.held.len() == 4);
    track.replay_ended(NOW);
    assert!(matches!(track.actions().next(), Some(Action::Deliver(_))));
}

/// What happens to a source and the way to it.
#[derive(Clone, Copy, Debug)]
enum Fate {
    /// It says something; `true`: and the subscriber is sent it.
    Says(bool),
    /// It starts anew.
    Restarts,
    /// The connection breaks and stands again.
    Breaks,
    /// The replay goes on by a batch, or is lost on the way (`false`), or ends.
    Replays(bool),
    /// The replay breaks off.
    BreaksOff,
}

fn any_fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        6 => prop::bool::weighted(0.8).prop_map(Fate::Says),
        1 => Just(Fate::Restarts),
        1 => Just(Fate::Breaks),
        8 => prop::bool::weighted(0.9).prop_map(Fate::Replays),
        1 => Just(Fate::BreaksOff),
    ]
}

/// A source that keeps its last five batches, and what a follower makes of it.
struct Play {
    life: u8,
    next: u64,
    track: Track,
    /// The next number that the replay under way brings.
    replay: Option<u64>,
    /// Nothing of it came yet. A full queue takes no more: what is lost is never the first.
    is_fresh: bool,
    /// In a row: a follower that gives up may take one life for another.
    broken_off: u8,
    /// What the follower knows: a life, and a range of its batches.
    known: Option<(u8, u64, u64)>,
}

impl Play {
    const KEPT: u64 = 5;

    fn obey(&mut self) {
        let actions: Vec<_> = self.track.actions().collect();
        for action in actions {
            match action {
                Action::Reset => self.known = None,
                Action::Replay(from) => (self.replay, self.is_fresh) = (Some(from), true),
                Action::Deliver(payload) => {
                    let life = payload[0];
                    let seq = u64::from_be_bytes(*payload[1..].first_chunk().unwrap());
                    self.known = Some(match self.known {
                        None => (life, seq, seq),
                        Some((known, first, last)) => {
                            assert_eq!(
                                (known, last + 1),
                                (life, seq),
                                "nothing is missing in what is known"
                            );
                            (life, first, seq)
                        }
                    });
                }
            }
        }
    }

    fn meet(&mut self, fate: Fate) {
        match fate {
            Fate::Says(arrives) => {
                let said = batch(self.life, self.next);
                self.next += 1;
                if arrives {
                    self.track.live(NOW, said);
                }
            }
            Fate::Restarts => {
                (self.life, self.next) = (self.life.wrapping_add(1), 0);
                self.reconnect();
            }
            Fate::Breaks => self.reconnect(),
            Fate::Replays(arrives) => self.replay_one(arrives),
            Fate::BreaksOff if self.replay.is_some() && self.broken_off < 2 => {
                self.broken_off += 1;
                self.replay = None;
                self.track.replay_failed(NOW);
            }
            Fate::BreaksOff => {}
        }
        self.obey();
    }

    fn reconnect(&mut self) {
        self.replay = None;
        self.track.lost();
        self.track.connected(NOW);
    }

    fn replay_one(&mut self, arrives: bool) {
        let Some(at) = self.replay else { return };
        let seq = at.max(self.next.saturating_sub(Self::KEPT));
        if seq >= self.next {
            self.replay = None;
            self.broken_off = 0;
            return self.track.replay_ended(NOW);
        }
        self.replay = Some(seq + 1);
        if std::mem::take(&mut self.is_fresh) || arrives {
            self.broken_off = 0;
            self.track.replayed(batch(self.life, seq));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 2000, ..ProptestConfig::default() })]

    /// Whatever happens, what is known is true of one life from some batch on; and when the way is clear again, it is
    /// all that the source keeps, or more.
    #[test]
    fn what_is_known_is_right_and_becomes_whole(fates in prop::collection::vec(any_fate(), 0..80)) {
        let mut play = Play { life: 0, next: 0, track: Track::new(true), replay: None, is_fresh: true, broken_off: 0, known: None };
        play.reconnect();
        play.obey();
        for fate in fates {
            play.meet(fate);
        }
        play.meet(Fate::Says(true));
        for _ in 0..60 {
            play.meet(Fate::Replays(true));
        }
        prop_assert!(play.replay.is_none());
        let (life, first, last) = play.known.unwrap();
        prop_assert_eq!((life, last + 1), (play.life, play.next));
        prop_assert!(first <= play.next.saturating_sub(Play::KEPT));
    }
}
