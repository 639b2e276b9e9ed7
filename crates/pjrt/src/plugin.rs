//! A loaded plugin: what it is called with before there is a client.

use crate::api::Api;
use crate::extension::{self, Extension};
use crate::{Result, Value, sys, value};
use std::path::Path;
use std::sync::Arc;

/// A device plugin, loaded and initialised. Cheap to clone; never unloaded.
#[derive(Clone)]
pub struct Plugin {
    api: Arc<Api>,
}

impl Plugin {
    /// Loads the shared library at `path` and initialises it (once a process).
    ///
    /// Loading runs the library's code: the file must be trusted like the program itself. Plugins read their
    /// environment while they are loaded: for libtpu without a TPU the process must have been started with
    /// `TPU_SKIP_MDS_QUERY=1`.
    ///
    /// # Errors
    /// The file is no shared library, no plugin, speaks another version of the API, or fails to initialise.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        Ok(Self {
            api: Api::load(path.as_ref())?,
        })
    }

    /// Major and minor version of the plugin's API.
    pub fn api_version(&self) -> (i32, i32) {
        self.api.version()
    }

    /// What the plugin says of itself, such as `xla_version` and the versions of StableHLO it reads.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn attributes(&self) -> Result<Vec<(String, Value)>> {
        let mut args = sys::PluginAttributes::new();
        // SAFETY: the arguments hold no pointers.
        unsafe { self.api.call(&mut args) }?;
        // SAFETY: the attributes live as long as the process.
        Ok(unsafe { value::from_raw(args.attributes, args.num_attributes) })
    }

    /// The newest version of StableHLO that the plugin reads, if it says so.
    ///
    /// # Errors
    /// The plugin refuses.
    pub fn stablehlo_version(&self) -> Result<Option<Vec<i64>>> {
        let attributes = self.attributes()?;
        Ok(attributes
            .into_iter()
            .find_map(|(name, value)| match value {
                Value::Int64List(version) if name == "stablehlo_current_version" => Some(version),
                _ => None,
            }))
    }

    /// The plugin's extensions, in its own order.
    pub fn extensions(&self) -> Vec<Extension> {
        extension::list(&self.api)
    }

    /// Whether the plugin has this extension.
    pub fn has_extension(&self, kind: Extension) -> bool {
        extension::find(&self.api, kind).is_some()
    }

    #[cfg(test)]
    pub(crate) fn from_api(api: Arc<Api>) -> Self {
        Self { api }
    }

    pub(crate) fn api(&self) -> &Arc<Api> {
        &self.api
    }
}
