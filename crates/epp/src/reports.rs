//! What servers report of their caches: each is followed, or all are waited for, and the fleet is told.

use crate::listen::ListenError;
use crate::words::Words;
use baton_fleet::{Fleet, Server};
use baton_kv_events::{
    Collector, Endpoint, Follower, Followers, Origin, Peer, Source, SourceEvent,
};
use baton_scheduler::{EndpointId, Events};
use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use tokio::sync::mpsc;

/// Batches that wait to be taken; then followers wait, and ask again for what they miss.
const WAITING: usize = 64;
/// Events that are noted at once; decisions wait meanwhile.
const SLICE: usize = 32;

/// Where reports come from.
#[derive(Debug)]
pub(crate) enum Reports {
    /// Every server is connected to.
    Followed(Events),
    /// Servers connect to us.
    Collected {
        collector: Collector,
        news: mpsc::Receiver<(Origin, SourceEvent)>,
    },
}

/// A server that is followed.
#[derive(Debug)]
struct Followed {
    source: Source,
    /// Its server's address: where that changes, what was reported is another server's.
    address: String,
    /// Tells its news from those of who was followed before in its place.
    turn: u64,
    _follower: Follower,
}

impl Reports {
    /// Listens, if servers are to connect to us; `*` stands for `star`.
    pub(crate) async fn bind(events: &Events, star: IpAddr) -> Result<Self, ListenError> {
        let Some(endpoint) = events.bind.as_deref() else {
            return Ok(Self::Followed(events.clone()));
        };
        let wrong = |error| ListenError::EventsEndpoint(endpoint.to_owned(), error);
        let at = Endpoint::parse_bind(endpoint, star).map_err(wrong)?;
        let (to, news) = mpsc::channel(WAITING);
        let collector = Collector::bind(at, events.topic.to_string(), to).await;
        Ok(Self::Collected {
            collector: collector.map_err(|error| ListenError::Bind(at, error))?,
            news,
        })
    }

    /// Tells `fleet` for ever, and `words` what prompts may ask for.
    pub(crate) async fn run(self, fleet: Arc<Fleet>, words: Arc<Words>) {
        match self {
            Self::Followed(events) => follow(&fleet, &events, &words).await,
            Self::Collected { collector, news } => {
                collect(&fleet, news, &words).await;
                drop(collector);
            }
        }
    }
}

async fn follow(fleet: &Arc<Fleet>, events: &Events, words: &Words) {
    let (to, mut news) = mpsc::channel(WAITING);
    let mut listings = fleet.listings();
    let mut following = Following {
        followers: Followers::default(),
        followed: HashMap::new(),
        turn: 0,
        to,
    };
    following.list(fleet, events);
    loop {
        tokio::select! {
            changed = listings.changed() => match changed {
                Ok(()) => following.list(fleet, events),
                Err(_) => return,
            },
            Some(((server, turn), event)) = news.recv() => {
                if following.followed.get(&server).is_some_and(|f| f.turn == turn) {
                    take(fleet, server, words, event).await;
                }
            }
        }
    }
}

/// Everybody who is followed.
struct Following {
    followers: Followers,
    followed: HashMap<EndpointId, Followed>,
    turn: u64,
    to: mpsc::Sender<((EndpointId, u64), SourceEvent)>,
}

impl Following {
    /// Follows those who are in the list, and nobody else.
    fn list(&mut self, fleet: &Fleet, events: &Events) {
        let mut before = std::mem::take(&mut self.followed);
        for server in fleet.servers().iter() {
            let Some(source) = source(server, events) else {
                continue;
            };
            let address = server.address.as_str();
            let followed = match before.remove(&server.id) {
                Some(same) if same.source == source && same.address == address => same,
                other => {
                    if other.is_some() {
                        fleet.reports_end(server.id);
                    }
                    self.begin(server, source)
                }
            };
            self.followed.insert(server.id, followed);
        }
        // What they had told may have been noted after they left the list.
        for gone in before.into_keys() {
            fleet.reports_end(gone);
        }
    }

    fn begin(&mut self, server: &Server, source: Source) -> Followed {
        self.turn += 1;
        let key = (server.id, self.turn);
        Followed {
            address: server.address.as_str().to_owned(),
            turn: self.turn,
            _follower: self.followers.follow(key, source.clone(), self.to.clone()),
            source,
        }
    }
}

/// Where `server` publishes: on its own address, each rank on the port after that of the rank before. None if there is
/// no such port.
fn source(server: &Server, events: &Events) -> Option<Source> {
    let host = server.address.authority().host();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let peer = |base: u16| {
        let port = u32::from(base).checked_add(server.rank)?;
        Some(Peer::new(host, u16::try_from(port).ok()?))
    };
    Some(Source {
        live: peer(events.port)?,
        replay: events.replay_port.and_then(peer),
        topic: events.topic.to_string(),
    })
}

async fn collect(
    fleet: &Arc<Fleet>,
    mut news: mpsc::Receiver<(Origin, SourceEvent)>,
    words: &Words,
) {
    let mut listings = fleet.listings();
    let mut told: HashSet<EndpointId> = HashSet::new();
    loop {
        tokio::select! {
            changed = listings.changed() => {
                if changed.is_err() {
                    return;
                }
                let here: HashSet<_> = fleet.servers().iter().map(|s| s.id).collect();
                // What they had told may have been noted after they left the list.
                for &gone in told.difference(&here) {
                    fleet.reports_end(gone);
                }
                told.retain(|server| here.contains(server));
            }
            event = news.recv() => {
                let Some((origin, event)) = event else { return };
                if let Some(server) = who(&fleet.servers(), &origin) {
                    told.insert(server);
                    take(fleet, server, words, event).await;
                }
            }
        }
    }
}

/// The server that `origin` says it is: `kv@IP:PORT@MODEL`, or the address without the port and the rank beside it.
fn who(servers: &[Arc<Server>], origin: &Origin) -> Option<EndpointId> {
    let pod = match origin.topic.split('@').collect::<Vec<_>>()[..] {
        [_, pod, _] => pod,
        _ => &origin.topic,
    };
    let is_it = |server: &&Arc<Server>| {
        let Some(at) = server.socket() else {
            return pod == server.address.as_str();
        };
        pod == server.address.as_str()
            || pod.parse() == Ok(at)
            || (pod.parse() == Ok(at.ip()) && server.rank == origin.rank)
    };
    servers.iter().find(is_it).map(|server| server.id)
}

async fn take(fleet: &Fleet, server: EndpointId, words: &Words, event: SourceEvent) {
    match event {
        SourceEvent::Reset => fleet.reports_lost(server),
        SourceEvent::Batch(batch) => {
            for slice in batch.events.chunks(SLICE) {
                words.learn(slice);
                fleet.reported(server, &words.model, slice);
                tokio::task::yield_now().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_fleet::{Address, EndpointSpec};
    use baton_scheduler::{PrefixIndex, Scheduler};

    fn fleet() -> Fleet {
        let config = baton_scheduler::config::default_config();
        let plan = baton_scheduler::config::load(&config).unwrap().plan;
        let fleet = Fleet::new(Scheduler::new(plan, PrefixIndex::new(1000)), 7);
        let mut specs: Vec<EndpointSpec> = ["10.0.0.1:8000", "10.0.0.1:8001", "[fd00::1]:8000"]
            .iter()
            .map(|at| EndpointSpec::new(*at, Address::parse(at).unwrap()))
            .collect();
        specs[1].rank = 1;
        fleet.set_endpoints(&specs).unwrap();
        fleet
    }

    #[test]
    fn each_rank_has_its_own_port_if_there_is_one() {
        let (fleet, mut events) = (
            fleet(),
            Events {
                bind: None,
                topic: "kv@".into(),
                port: 5557,
                replay_port: Some(6000),
                sglang: false,
            },
        );
        let servers = fleet.servers();
        let of = |i: usize, events: &Events| source(&servers[i], events);
        let second = of(1, &events).unwrap();
        assert_eq!(second.live, Peer::new("10.0.0.1", 5558));
        assert_eq!(second.replay, Some(Peer::new("10.0.0.1", 6001)));
        assert_eq!(of(2, &events).unwrap().live, Peer::new("fd00::1", 5557));
        events.port = u16::MAX;
        assert_eq!(of(1, &events), None);
    }

    #[test]
    fn topics_say_who_speaks() {
        let fleet = fleet();
        let servers = fleet.servers();
        let is = |topic: &str, rank| {
            let found = who(
                &servers,
                &Origin {
                    topic: topic.into(),
                    rank,
                },
            )?;
            servers.iter().position(|s| s.id == found)
        };
        for (topic, rank, found) in [
            ("kv@10.0.0.1:8001@org/model", 0, Some(1)),
            ("kv@10.0.0.1@m", 0, Some(0)),
            ("kv@10.0.0.1@m", 1, Some(1)),
            ("kv@[fd00::1]:8000@m", 0, Some(2)),
            ("10.0.0.1:8000", 0, Some(0)),
            ("kv@10.0.0.2:8000@m", 0, None),
            ("kv@somebody@else@m", 0, None),
        ] {
            assert_eq!(is(topic, rank), found, "{topic}");
        }
    }
}
