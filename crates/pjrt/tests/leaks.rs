//! Nothing is left behind: handles are made and dropped over and over, and the process stays as large as it was.
//!
//! One test, alone in its process: it weighs the process.

mod common;

use baton_pjrt::{
    Arg, Client, CompileOptions, DType, Device, HostMemory, LoadedExecutable, Result, Sharing,
};
use common::{ADD, BUMP, BUMP_LEN, client};

/// Resident memory of this process, in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux tells");
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .expect("Linux tells");
    let kib = line
        .split_whitespace()
        .nth(1)
        .and_then(|kib| kib.parse::<usize>().ok());
    kib.expect("a number of kilobytes") * 1024
}

/// Every path once: about 8 MiB of arrays, failures included.
fn round(client: &Client, device: &Device, bump: &LoadedExecutable) -> Result<()> {
    let dims = [BUMP_LEN as i64];
    let values = vec![1.0_f32; BUMP_LEN];
    let one = client.buffer_from_slice(&values, &dims, device)?;
    for sharing in [Sharing::UntilCopied, Sharing::ZeroCopy] {
        let memory = HostMemory::from_slice(&values);
        let state = client.buffer_from_owned(memory, DType::F32, &dims, device, sharing)?;
        let (state, done) = bump.execute_tracked([Arg::Donate(state), Arg::Borrow(&one)])?;
        done.on_ready(drop)?;
        state[0]
            .download_into(HostMemory::zeroed(BUMP_LEN * 4))?
            .wait()?;
        drop(state[0].download_into(HostMemory::zeroed(BUMP_LEN * 4))?);
        done.wait()?;
    }
    let wrong = HostMemory::from_slice(&values);
    let refused = client.buffer_from_owned(wrong, DType::F32, &[1], device, Sharing::ZeroCopy);
    assert!(refused.is_err());
    assert!(one.download_into(vec![0; BUMP_LEN]).is_err());
    let given = client.buffer_from_slice(&values, &dims, device)?;
    assert!(bump.execute([Arg::Donate(given)]).is_err());
    device.description()?.attributes()?;
    Ok(())
}

/// Programs and clients, which are dearer.
fn dear_round() -> Result<()> {
    let (client, _devices) = client(2);
    let add = client.compile(ADD, &CompileOptions::default())?;
    let bytes = add.executable().serialize()?;
    client.deserialize(&bytes)?;
    assert!(client.deserialize(b"no program").is_err());
    assert!(
        client
            .compile("no program", &CompileOptions::default())
            .is_err()
    );
    Ok(())
}

#[test]
fn nothing_is_left_behind() {
    let (client, devices) = client(1);
    let bump = client.compile(BUMP, &CompileOptions::default()).unwrap();
    // What is lost in every round shows in every stretch of rounds; the allocator's own play does not.
    let grown = |rounds: usize, round: &dyn Fn() -> Result<()>| {
        (0..rounds / 4).for_each(|_| round().unwrap());
        let stretch = |_| {
            let before = resident();
            (0..rounds).for_each(|_| round().unwrap());
            resident().saturating_sub(before)
        };
        (0..3).map(stretch).min().unwrap_or_default()
    };
    let arrays = grown(200, &|| round(&client, &devices[0], &bump));
    let programs = grown(40, &dear_round);
    // 200 rounds would leave 200 MiB behind if one array a round were lost; the allocator's own play is small.
    assert!(arrays < 8 << 20, "{arrays} bytes more after 200 rounds");
    assert!(
        programs < 16 << 20,
        "{programs} bytes more after 40 clients"
    );
}
