//! baton-text
