//! The list of served models.

use crate::AlwaysNull;
use serde::Serialize;

/// The answer of `GET /v1/models`.
#[derive(Clone, Debug, Serialize)]
pub struct ModelList {
    object: &'static str,
    /// One entry a served name.
    pub data: Vec<Model>,
}

impl ModelList {
    /// A list of `data`.
    #[must_use]
    pub fn new(data: Vec<Model>) -> Self {
        Self {
            object: "list",
            data,
        }
    }
}

/// One served name.
#[derive(Clone, Debug, Serialize)]
pub struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: String,
    parent: AlwaysNull,
    max_model_len: u32,
    permission: [Permission; 1],
}

impl Model {
    /// The name `id` for the model at `root`. `created` is in seconds since 1970; `permission_id` is any 16 or more
    /// hexadecimal digits.
    #[must_use]
    pub fn new(
        id: &str,
        root: &str,
        max_model_len: u32,
        created: u64,
        permission_id: &str,
    ) -> Self {
        Self {
            id: id.to_owned(),
            object: "model",
            created,
            owned_by: "baton",
            root: root.to_owned(),
            parent: (),
            max_model_len,
            permission: [Permission::new(created, permission_id)],
        }
    }
}

/// What OpenAI's API once said about who may do what. Clients still expect it.
#[derive(Clone, Debug, Serialize)]
struct Permission {
    id: String,
    object: &'static str,
    created: u64,
    allow_create_engine: bool,
    allow_sampling: bool,
    allow_logprobs: bool,
    allow_search_indices: bool,
    allow_view: bool,
    allow_fine_tuning: bool,
    organization: &'static str,
    group: AlwaysNull,
    is_blocking: bool,
}

impl Permission {
    fn new(created: u64, id: &str) -> Self {
        Self {
            id: format!("modelperm-{id}"),
            object: "model_permission",
            created,
            allow_create_engine: false,
            allow_sampling: true,
            allow_logprobs: true,
            allow_search_indices: false,
            allow_view: true,
            allow_fine_tuning: false,
            organization: "*",
            group: (),
            is_blocking: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_has_the_keys_of_the_guide_in_its_order() {
        let list = ModelList::new(vec![Model::new("m", "/m", 2048, 7, "0123456789abcdef")]);
        assert_eq!(
            serde_json::to_string(&list).unwrap(),
            concat!(
                r#"{"object":"list","data":[{"id":"m","object":"model","created":7,"owned_by":"baton","root":"/m","#,
                r#""parent":null,"max_model_len":2048,"permission":[{"id":"modelperm-0123456789abcdef","#,
                r#""object":"model_permission","created":7,"allow_create_engine":false,"allow_sampling":true,"#,
                r#""allow_logprobs":true,"allow_search_indices":false,"allow_view":true,"allow_fine_tuning":false,"#,
                r#""organization":"*","group":null,"is_blocking":false}]}]}"#
            )
        );
    }
}
