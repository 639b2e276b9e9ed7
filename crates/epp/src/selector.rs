//! Pods without a pool: what the flags make of them. Pure.

use baton_k8s::{AppProtocol, Members, Pool};

/// As many ports as a pool may have.
const MAX_PORTS: usize = 8;
/// The pool's name where nobody says one.
const NAMELESS: &str = "baton";

/// A selector and ports that make no endpoints.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SelectorError {
    /// Not a selector.
    #[error(
        "--endpoint-selector {0:?}: this is no selector of labels, such as app=vllm,tier!=test"
    )]
    Selector(String),
    /// One without the other.
    #[error("--endpoint-selector and --endpoint-target-ports belong together")]
    Alone,
    /// Too many, or none.
    #[error("--endpoint-target-ports: one to {MAX_PORTS} ports, from 1 to 65535")]
    Ports,
}

/// The pool that a selector and ports stand for; nothing, if there are none.
pub(crate) fn pool(selector: Option<&str>, ports: &[u16]) -> Result<Option<Pool>, SelectorError> {
    // A flag that a chart left empty means what no flag means.
    let selector = selector.map(str::trim).filter(|s| !s.is_empty());
    let Some(selector) = selector else {
        return match ports.is_empty() {
            true => Ok(None),
            false => Err(SelectorError::Alone),
        };
    };
    let known = |c: char| c.is_ascii_alphanumeric() || "._-/=!(), ".contains(c);
    if !selector.chars().all(known) {
        return Err(SelectorError::Selector(selector.to_owned()));
    }
    if ports.is_empty() {
        return Err(SelectorError::Alone);
    }
    let mut target_ports: Vec<u16> = Vec::new();
    for &port in ports {
        if !target_ports.contains(&port) {
            target_ports.push(port);
        }
    }
    if target_ports.contains(&0) || target_ports.len() > MAX_PORTS {
        return Err(SelectorError::Ports);
    }
    Ok(Some(Pool {
        members: Members::Query(selector.to_owned()),
        target_ports,
        app_protocol: AppProtocol::Http,
    }))
}

/// The name of such a pool: that of the Deployment whose pod this picker is, as llm-d has it.
pub(crate) fn name(pod: Option<&str>) -> String {
    let pod = pod.filter(|name| !name.is_empty()).unwrap_or(NAMELESS);
    let mut parts = pod.rsplitn(3, '-');
    let drawn = |part: Option<&str>| {
        part.is_some_and(|p| {
            let known = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
            !p.is_empty() && p.bytes().all(known)
        })
    };
    let (last, before) = (parts.next(), parts.next());
    match parts.next() {
        Some(deployment) if !deployment.is_empty() && drawn(last) && drawn(before) => {
            deployment.to_owned()
        }
        _ => pod.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deployment_is_told_from_the_name_of_its_pod() {
        for (pod, deployment) in [
            (Some("my-picker-7d9f8-x2k4p"), "my-picker"),
            (Some("picker-0"), "picker-0"),
            (Some("-a-b"), "-a-b"),
            (Some(""), NAMELESS),
            (None, NAMELESS),
        ] {
            assert_eq!(name(pod), deployment, "{pod:?}");
        }
    }

    #[test]
    fn selectors_and_ports_come_together_and_make_sense() {
        assert_eq!(pool(None, &[]), Ok(None));
        assert_eq!(pool(Some(" "), &[]), Ok(None));
        assert_eq!(pool(Some("a=b"), &[]), Err(SelectorError::Alone));
        assert_eq!(
            pool(Some("a=b&c"), &[1]),
            Err(SelectorError::Selector("a=b&c".into()))
        );
        let many: Vec<u16> = (1..=9).collect();
        for ports in [&many[..], &[0]] {
            assert_eq!(
                pool(Some("a in (b, c),!d"), ports),
                Err(SelectorError::Ports)
            );
        }
        assert!(pool(Some("a in (b, c),!d"), &many[..8]).unwrap().is_some());
    }
}
