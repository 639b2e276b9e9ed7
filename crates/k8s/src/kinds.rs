//! The kinds of objects that are read, with the fields that are used and no others.

use kube::Resource;
use kube::api::ObjectMeta;
use kube::core::DynamicResourceScope;
use serde::Deserialize;
use std::borrow::Cow;
use std::collections::BTreeMap;

/// A kind as the API server serves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kind {
    /// Its API group; empty for the core.
    pub(crate) group: &'static str,
    /// The version that is asked for.
    pub(crate) version: &'static str,
    /// Its name in paths.
    pub(crate) plural: &'static str,
    /// Its name in objects.
    pub(crate) kind: &'static str,
}

/// The group of pools since they are stable.
pub const POOL_GROUP: &str = "inference.networking.k8s.io";
/// The group of everything before that.
pub const OLD_GROUP: &str = "inference.networking.x-k8s.io";
/// The group to which objectives and rewrites have moved.
pub const NEW_GROUP: &str = "llm-d.ai";

pub(crate) const PODS: Kind = Kind {
    group: "",
    version: "v1",
    plural: "pods",
    kind: "Pod",
};
pub(crate) const POOLS: Kind = Kind {
    group: POOL_GROUP,
    version: "v1",
    plural: "inferencepools",
    kind: "InferencePool",
};
pub(crate) const OLD_POOLS: Kind = Kind {
    group: OLD_GROUP,
    version: "v1alpha2",
    ..POOLS
};
/// By preference.
pub(crate) const OBJECTIVES: [Kind; 2] = [
    Kind {
        group: NEW_GROUP,
        version: "v1alpha2",
        plural: "inferenceobjectives",
        kind: "InferenceObjective",
    },
    Kind {
        group: OLD_GROUP,
        version: "v1alpha2",
        plural: "inferenceobjectives",
        kind: "InferenceObjective",
    },
];
/// By preference.
pub(crate) const REWRITES: [Kind; 2] = [
    Kind {
        plural: "inferencemodelrewrites",
        kind: "InferenceModelRewrite",
        ..OBJECTIVES[0]
    },
    Kind {
        plural: "inferencemodelrewrites",
        kind: "InferenceModelRewrite",
        ..OBJECTIVES[1]
    },
];

/// An object of any kind: what it is to be and how it is.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Object<Spec, Status = Nothing> {
    #[serde(default)]
    pub(crate) metadata: ObjectMeta,
    #[serde(default)]
    pub(crate) spec: Spec,
    #[serde(default)]
    pub(crate) status: Status,
}

/// Whatever is there, it is not looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct Nothing {}

impl<Spec, Status> Resource for Object<Spec, Status> {
    type DynamicType = Kind;
    type Scope = DynamicResourceScope;

    fn kind(kind: &Kind) -> Cow<'_, str> {
        kind.kind.into()
    }

    fn group(kind: &Kind) -> Cow<'_, str> {
        kind.group.into()
    }

    fn version(kind: &Kind) -> Cow<'_, str> {
        kind.version.into()
    }

    fn plural(kind: &Kind) -> Cow<'_, str> {
        kind.plural.into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// `spec` of a pool, in the words of both versions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct PoolSpec {
    pub(crate) selector: Selector,
    pub(crate) target_ports: Vec<TargetPort>,
    pub(crate) target_port_number: Option<i32>,
    pub(crate) app_protocol: Option<String>,
}

/// Labels that a pod must have: under a name since v1, bare before.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub(crate) enum Selector {
    Named {
        #[serde(rename = "matchLabels")]
        match_labels: BTreeMap<String, String>,
    },
    Bare(BTreeMap<String, String>),
}

impl Default for Selector {
    fn default() -> Self {
        Self::Bare(BTreeMap::new())
    }
}

/// One port of each of a pool's pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct TargetPort {
    pub(crate) number: i32,
}

/// `status` of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct PodStatus {
    #[serde(rename = "podIP")]
    pub(crate) pod_ip: Option<String>,
    pub(crate) conditions: Vec<Condition>,
}

/// One of the things that are true of an object or not.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Condition {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) status: String,
}

/// The pool that an objective or a rewrite is for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(crate) struct PoolRef {
    pub(crate) group: Option<String>,
    pub(crate) kind: Option<String>,
    pub(crate) name: String,
}

/// `spec` of an objective.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ObjectiveSpec {
    pub(crate) priority: Option<i32>,
    pub(crate) pool_ref: PoolRef,
}

/// `spec` of a rewrite.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct RewriteSpec {
    pub(crate) pool_ref: PoolRef,
    pub(crate) rules: Vec<RuleSpec>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(crate) struct RuleSpec {
    pub(crate) matches: Vec<MatchSpec>,
    pub(crate) targets: Vec<TargetSpec>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(crate) struct MatchSpec {
    pub(crate) model: ModelSpec,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(crate) struct ModelSpec {
    pub(crate) value: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct TargetSpec {
    pub(crate) model_rewrite: String,
    pub(crate) weight: Option<u32>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn both_versions_of_a_pool_are_read() {
        let read = |spec| serde_json::from_value::<PoolSpec>(spec).unwrap();
        let new = read(json!({
            "selector": {"matchLabels": {"app": "m"}}, "targetPorts": [{"number": 8000}, {"number": 8001}],
            "endpointPickerRef": {"name": "p"}, "appProtocol": "kubernetes.io/h2c"
        }));
        assert!(
            matches!(&new.selector, Selector::Named { match_labels } if match_labels["app"] == "m")
        );
        assert_eq!(new.target_ports.len(), 2);
        let old = read(
            json!({"selector": {"app": "m"}, "targetPortNumber": 8000, "extensionRef": {"name": "p"}}),
        );
        assert!(matches!(&old.selector, Selector::Bare(labels) if labels["app"] == "m"));
        assert_eq!(old.target_port_number, Some(8000));
    }

    #[test]
    fn an_object_may_lack_everything() {
        let pod: Object<Nothing, PodStatus> = serde_json::from_value(json!({})).unwrap();
        assert_eq!(pod.status, PodStatus::default());
        let path = Object::<Nothing>::url_path(&PODS, Some("n"));
        assert_eq!(path, "/api/v1/namespaces/n/pods");
        let path = Object::<Nothing>::url_path(&REWRITES[0], Some("n"));
        assert_eq!(
            path,
            "/apis/llm-d.ai/v1alpha2/namespaces/n/inferencemodelrewrites"
        );
    }
}
