//! Where a request goes, from its headers alone; llm-d's order of decisions.
//!
//! Pure: chance comes in as a number. The headers that decide are taken out here and reach no server.

use crate::allow::AllowList;
use crate::foreign::{self, ENCODERS, KV_SOURCE, PREFILLER, RANK};
use crate::refusal::Refusal;
use crate::target::{Listed, Target};
use http::HeaderMap;

/// What the headers said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Steering {
    prefill: Listed,
    source: Option<Target>,
    rank: Option<String>,
    /// Encode servers were named, which there are none of here.
    pub(crate) encoders: bool,
}

impl Steering {
    /// Takes it out of `headers`. The rank's header alone stays: the server may want it.
    pub(crate) fn take(headers: &mut HeaderMap) -> Self {
        let rank = headers.get(&RANK).and_then(|v| v.to_str().ok());
        let mut sources = Listed::of(headers, &KV_SOURCE);
        let steering = Self {
            prefill: Listed::of(headers, &PREFILLER),
            source: sources
                .targets
                .pop()
                .filter(|_| sources == Listed::default()),
            rank: rank
                .map(str::trim)
                .filter(|r| !r.is_empty())
                .map(str::to_owned),
            encoders: headers.contains_key(&ENCODERS),
        };
        foreign::strip_headers(headers);
        steering
    }
}

/// The prefill servers to be asked, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Prefill {
    /// None was named: decode does everything.
    Unwanted,
    /// What was named is no address.
    Malformed,
    /// At least one.
    At(Vec<Target>),
}

/// Where a request goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) prefill: Prefill,
    /// A server that holds part of the prompt's KV.
    pub(crate) source: Option<Target>,
}

/// How servers are chosen from a list.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Choosing<'a> {
    pub(crate) allow: &'a AllowList,
    /// Most that are asked.
    pub(crate) most: usize,
    /// Where to begin in the list; from the front if there is no number.
    pub(crate) pick: Option<u64>,
}

impl Steering {
    /// Decides.
    ///
    /// # Errors
    /// [`Refusal::NotAllowed`] if prefill servers are named and none of them may be asked.
    pub(crate) fn plan(&self, choosing: Choosing<'_>) -> Result<Plan, Refusal> {
        let allow = choosing.allow;
        Ok(Plan {
            prefill: self.prefill(choosing)?,
            source: self.source.clone().filter(|s| allow.allows(s)),
        })
    }

    fn prefill(&self, choosing: Choosing<'_>) -> Result<Prefill, Refusal> {
        if self.prefill.is_empty() {
            return Ok(Prefill::Unwanted);
        }
        let mut targets = self.prefill.targets.clone();
        if targets.is_empty() {
            return Ok(Prefill::Malformed);
        }
        targets.retain(|target| choosing.allow.allows(target));
        if targets.is_empty() {
            return Err(Refusal::NotAllowed);
        }
        let begin = choosing.pick.unwrap_or(0) % targets.len() as u64;
        targets.rotate_left(usize::try_from(begin).unwrap_or(0));
        targets.truncate(choosing.most);
        Ok(Prefill::At(targets))
    }

    /// The rank that a request on rank 0's port is meant for. `ports` are those of all ranks, `pod_ip` their address.
    ///
    /// # Errors
    /// [`Refusal::UnknownRank`] if none of them is named.
    pub(crate) fn rank(&self, pod_ip: Option<&str>, port: u16, ranks: u16) -> Result<u16, Refusal> {
        let Some(named) = &self.rank else {
            return Ok(0);
        };
        let target = Target::parse(named).ok_or(Refusal::UnknownRank)?;
        let here = pod_ip.is_none_or(|ip| ip == target.host());
        let rank = target
            .port()
            .checked_sub(port)
            .filter(|rank| here && *rank < ranks);
        rank.ok_or(Refusal::UnknownRank)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Allowed;
    use http::{HeaderName, HeaderValue};

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &'static str)| {
            (
                HeaderName::from_static(name),
                HeaderValue::from_static(value),
            )
        };
        pairs.iter().map(pair).collect()
    }

    fn targets(names: &[&str]) -> Prefill {
        Prefill::At(names.iter().map(|n| Target::parse(n).unwrap()).collect())
    }

    fn plan(list: &'static str, most: usize, pick: Option<u64>) -> Result<Plan, Refusal> {
        let allow = AllowList::new(&Allowed::Anyone).unwrap();
        let mut headers = headers(&[("x-prefiller-host-port", list)]);
        Steering::take(&mut headers).plan(Choosing {
            allow: &allow,
            most,
            pick,
        })
    }

    #[test]
    fn the_first_servers_of_the_list_are_asked_unless_chance_picks() {
        assert_eq!(
            plan("a:1,b:2,c:3", 2, None).unwrap().prefill,
            targets(&["a:1", "b:2"])
        );
        assert_eq!(
            plan("a:1,b:2,c:3", 2, Some(5)).unwrap().prefill,
            targets(&["c:3", "a:1"])
        );
        assert_eq!(plan("a:1,b:2", 1, None).unwrap().prefill, targets(&["a:1"]));
        assert_eq!(plan(", ,b:2", 2, None).unwrap().prefill, targets(&["b:2"]));
        assert_eq!(plan("", 2, None).unwrap().prefill, Prefill::Unwanted);
        assert_eq!(
            plan("https://a:1", 2, None).unwrap().prefill,
            Prefill::Malformed
        );
    }

    #[test]
    fn servers_that_are_not_allowed_are_not_asked() {
        let file = std::env::temp_dir().join(format!("baton-dispatch-{}", std::process::id()));
        std::fs::write(&file, "b:2\n").unwrap();
        let allow = AllowList::new(&Allowed::File(file.clone())).unwrap();
        std::fs::remove_file(file).unwrap();
        let plan = |list| {
            let pairs = [
                ("x-prefiller-host-port", list),
                ("x-kv-cache-source-host-port", "evil:1"),
            ];
            let choosing = Choosing {
                allow: &allow,
                most: 2,
                pick: None,
            };
            Steering::take(&mut headers(&pairs)).plan(choosing)
        };
        let allowed = Plan {
            prefill: targets(&["b:2"]),
            source: None,
        };
        assert_eq!(plan("evil:1,b:2"), Ok(allowed));
        assert_eq!(plan("evil:1"), Err(Refusal::NotAllowed));
    }

    #[test]
    fn the_headers_that_decide_are_taken_out() {
        let mut headers = headers(&[
            ("x-prefiller-host-port", "a:1"),
            ("x-prefiller-url", "http://a:1"),
            ("x-encoder-hosts-ports", "e:1"),
            ("x-kv-cache-source-host-port", "s:1"),
            ("x-data-parallel-host-port", "10.0.0.9:8001"),
            ("authorization", "Bearer x"),
        ]);
        let steering = Steering::take(&mut headers);
        assert!(steering.encoders && steering.source.is_some());
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["authorization", "x-data-parallel-host-port"]);
    }

    #[test]
    fn a_rank_is_named_by_its_address() {
        let rank = |value: &'static str, ip| {
            let mut headers = headers(&[("x-data-parallel-host-port", value)]);
            Steering::take(&mut headers).rank(ip, 8000, 2)
        };
        let ip = Some("10.0.0.9");
        assert_eq!(rank("10.0.0.9:8001", ip), Ok(1));
        assert_eq!(rank("10.0.0.9:8000", ip), Ok(0));
        assert_eq!(rank("10.0.0.8:8001", None), Ok(1));
        for unknown in [
            "10.0.0.8:8001",
            "10.0.0.9:8002",
            "10.0.0.9:7999",
            "nonsense",
        ] {
            assert_eq!(rank(unknown, ip), Err(Refusal::UnknownRank));
        }
        assert_eq!(Steering::default().rank(ip, 8000, 2), Ok(0));
    }
}
