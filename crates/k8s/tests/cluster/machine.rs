//! The cluster's tool, and a namespace for each test.

use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A namespace on the control plane.
pub(crate) struct Machine {
    pub(crate) namespace: String,
    pub(crate) client: Client,
    kubeconfig: PathBuf,
}

impl Machine {
    /// An empty namespace of this name, with the definitions installed.
    pub(crate) async fn new(namespace: &str) -> Self {
        let kubeconfig = PathBuf::from(tool(&["kubeconfig"]).trim());
        let client = baton_k8s::client(Some(&kubeconfig)).await.unwrap();
        for set in ["inference", "llm-d"] {
            tool(&["define", set]);
        }
        let machine = Self {
            namespace: namespace.to_owned(),
            client,
            kubeconfig,
        };
        tool(&[
            "exec",
            "kubectl",
            "delete",
            "namespace",
            namespace,
            "--ignore-not-found",
            "--wait",
        ]);
        tool(&["exec", "kubectl", "create", "namespace", namespace]);
        // Without it no pod may be made.
        machine.kubectl(&[
            "wait",
            "--for=create",
            "serviceaccount/default",
            "--timeout=60s",
        ]);
        machine
    }

    pub(crate) fn kubectl(&self, arguments: &[&str]) -> String {
        let head = ["exec", "kubectl", "--namespace", &self.namespace];
        tool(&[&head[..], arguments].concat())
    }

    pub(crate) fn apply(&self, yaml: &str) {
        let mut child = command(&[
            "exec",
            "kubectl",
            "--namespace",
            &self.namespace,
            "apply",
            "-f",
            "-",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(yaml.as_bytes())
            .unwrap();
        assert!(child.wait().unwrap().success(), "{yaml}");
    }

    pub(crate) fn pool(&self, app: &str, ports: &[u16]) {
        let ports: Vec<_> = ports.iter().map(|p| json!({"number": p})).collect();
        self.apply(
            &json!({
                "apiVersion": "inference.networking.k8s.io/v1", "kind": "InferencePool", "metadata": {"name": "pool"},
                "spec": {"selector": {"matchLabels": {"app": app}}, "targetPorts": ports,
                         "endpointPickerRef": {"name": "picker", "port": {"number": 9002}}}
            })
            .to_string(),
        );
    }

    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Makes a pod, and makes it ready as a kubelet would.
    pub(crate) async fn pod(&self, name: &str, app: &str) {
        let pod = json!({
            "metadata": {"name": name, "labels": {"app": app, "llm-d.ai/role": "decode"}},
            "spec": {"containers": [{"name": "c", "image": "i"}]}
        });
        let params = PostParams::default();
        self.pods()
            .create(&params, &serde_json::from_value(pod).unwrap())
            .await
            .unwrap();
        self.ready(name, true).await;
    }

    pub(crate) async fn ready(&self, name: &str, ready: bool) {
        // An address of loopback, since pickers ask their endpoints for metrics.
        let status = json!({"status": {
            "podIP": "127.9.8.7", "podIPs": [{"ip": "127.9.8.7"}],
            "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]
        }});
        let params = PatchParams::default();
        self.pods()
            .patch_status(name, &params, &Patch::Merge(status))
            .await
            .unwrap();
    }

    pub(crate) async fn remove(&self, name: &str) {
        self.pods()
            .delete(name, &DeleteParams::default())
            .await
            .unwrap();
    }

    /// A client that is a service account of the namespace.
    pub(crate) async fn account(&self, name: &str) -> Client {
        let token = self.token(name);
        let file = std::fs::read(&self.kubeconfig).unwrap();
        let mut config: serde_json::Value = serde_json::from_slice(&file).unwrap();
        config["users"][0]["user"] = json!({"token": token});
        let path =
            std::env::temp_dir().join(format!("baton-k8s-{}-{name}.json", std::process::id()));
        std::fs::write(&path, config.to_string()).unwrap();
        let client = baton_k8s::client(Some(&path)).await.unwrap();
        std::fs::remove_file(&path).unwrap();
        client
    }

    pub(crate) fn token(&self, account: &str) -> String {
        self.kubectl(&["create", "token", account])
            .trim()
            .to_owned()
    }

    /// What a service account was allowed and did: "VERB GROUP/RESOURCE".
    pub(crate) fn used_by(&self, account: &str) -> std::collections::BTreeSet<String> {
        let user = format!("system:serviceaccount:{}:{account}", self.namespace);
        let log = std::fs::read_to_string(self.kubeconfig.with_file_name("audit.log")).unwrap();
        let entries = log
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        entries
            .filter(|e| {
                e["user"]["username"] == user.as_str() && e["objectRef"]["resource"].is_string()
            })
            .filter(|e| {
                e["responseStatus"]["code"]
                    .as_u64()
                    .is_some_and(|code| code < 300)
            })
            .map(|e| {
                let text =
                    |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
                format!(
                    "{} {}/{}",
                    text(&e["verb"]),
                    text(&e["objectRef"]["apiGroup"]),
                    text(&e["objectRef"]["resource"])
                )
            })
            .collect()
    }
}

fn command(arguments: &[&str]) -> Command {
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/cluster/cluster.py");
    let name = std::env::var("BATON_CLUSTER").unwrap_or_else(|_| "k8s".to_owned());
    let mut command = Command::new("python3");
    command.arg(tool).args(["--name", &name]).args(arguments);
    command
}

/// Runs the cluster's tool and returns what it says.
pub(crate) fn tool(arguments: &[&str]) -> String {
    let done = command(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{arguments:?}: {said}");
    String::from_utf8(done.stdout).unwrap()
}

/// Whether the cluster's tool does not fail.
pub(crate) fn works(arguments: &[&str]) -> bool {
    command(arguments).output().unwrap().status.success()
}
