//! baton-pjrt
