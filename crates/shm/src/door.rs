//! How an arena's file gets from one process to another: through a Unix socket that has a name but no place in the file
//! system, and that only processes of the same network namespace can reach.
//!
//! Whoever knocks says a password of sixteen bytes and gets the file, or nothing.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Both sides are on one machine and have nothing else to do.
const PATIENCE: Duration = Duration::from_millis(200);
/// What comes with the file.
const HERE: [u8; 1] = [1];

/// Where knocks are heard.
#[derive(Debug)]
pub struct Door {
    listener: UnixListener,
    name: String,
}

impl Door {
    /// # Errors
    /// When the name is taken, or the system has no such sockets.
    pub fn new(name: &str) -> io::Result<Self> {
        let listener = UnixListener::bind_addr(&address(name)?)?;
        let name = name.to_owned();
        Ok(Self { listener, name })
    }

    /// Waits for one who knocks, and hands out `file` if `knows` the password. One who says nothing is given up on soon.
    ///
    /// # Errors
    /// When nobody can be heard any more, or the one who knocked was not served.
    pub fn answer(&self, file: &File, knows: impl FnOnce(&[u8; 16]) -> bool) -> io::Result<()> {
        let (mut visitor, _) = self.listener.accept()?;
        visitor.set_read_timeout(Some(PATIENCE))?;
        visitor.set_write_timeout(Some(PATIENCE))?;
        let mut password = [0; 16];
        visitor.read_exact(&mut password)?;
        if knows(&password) {
            hand(&visitor, file)?;
        }
        Ok(())
    }

    /// Ends one wait for a knock.
    pub fn wake(&self) {
        // If nobody can knock, nobody waits.
        let _ = address(&self.name).and_then(|addr| UnixStream::connect_addr(&addr));
    }
}

fn address(name: &str) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(name)
}

fn hand(visitor: &UnixStream, file: &File) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut with = SendAncillaryBuffer::new(&mut space);
    let fds = [file.as_fd()];
    with.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(
        visitor,
        &[IoSlice::new(&HERE)],
        &mut with,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// Asks for the file behind the door of that name.
///
/// # Errors
/// When there is no such door here, or it stays closed.
pub fn knock(name: &str, password: &[u8; 16]) -> io::Result<File> {
    let mut door = UnixStream::connect_addr(&address(name)?)?;
    door.set_read_timeout(Some(PATIENCE))?;
    door.set_write_timeout(Some(PATIENCE))?;
    door.write_all(password)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut with = RecvAncillaryBuffer::new(&mut space);
    let mut byte = HERE;
    recvmsg(
        &door,
        &mut [IoSliceMut::new(&mut byte)],
        &mut with,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let fds = with.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let file = fds.flatten().next().map(File::from);
    file.ok_or_else(|| io::ErrorKind::PermissionDenied.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Arena, View};

    /// A name that no other test has.
    fn name(test: &str) -> String {
        format!("baton-test-{}-{test}", std::process::id())
    }

    #[test]
    fn who_knows_the_password_gets_the_file() {
        let (name, arena) = (name("knows"), Arena::new(4096).unwrap());
        let door = Door::new(&name).unwrap();
        let file = arena.file().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| door.answer(file, |password| password == &[7; 16]).unwrap());
            let view = View::open(&knock(&name, &[7; 16]).unwrap()).unwrap();
            let mut room = arena.room(3).unwrap();
            room.copy_from_slice(b"abc");
            let mut seen = [0; 3];
            view.copy(room.place().offset as usize, &mut seen);
            assert!(&seen == b"abc" && view.holds(&room.place()));
        });
    }

    #[test]
    fn who_does_not_gets_nothing() {
        let (name, arena) = (name("not"), Arena::new(4096).unwrap());
        let door = Door::new(&name).unwrap();
        let file = arena.file().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| door.answer(file, |_| false).unwrap());
            assert!(knock(&name, &[7; 16]).is_err());
            let silent = scope.spawn(|| door.answer(file, |_| true));
            let _visitor = UnixStream::connect_addr(&address(&name).unwrap()).unwrap();
            assert!(
                silent.join().unwrap().is_err(),
                "one who says nothing is not waited for"
            );
            let woken = scope.spawn(|| door.answer(file, |_| true));
            door.wake();
            assert!(woken.join().unwrap().is_err());
        });
    }

    #[test]
    fn a_door_that_is_not_there_is_told_at_once() {
        assert!(knock(&name("nowhere"), &[0; 16]).is_err());
        let _door = Door::new(&name("taken")).unwrap();
        assert!(Door::new(&name("taken")).is_err());
    }
}
