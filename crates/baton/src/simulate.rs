//! `baton simulate`: from flags to a study.

use crate::Failure;
use crate::cli::Simulate;
use anyhow::{Context as _, bail, ensure};
use baton_simulate::{Conversations, EngineModel, Policy, Setup, Split, Study, Workload};

/// Requests of made-up conversations, if nothing is said.
const REQUESTS: usize = 3000;

pub(crate) fn command(args: &Simulate) -> Result<(), Failure> {
    let study = study(args).map_err(Failure::Usage)?;
    let load = workload(args).map_err(Failure::Usage)?;
    study.run(&load, say);
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the tables are the output")]
fn say(line: &str) {
    println!("{line}");
}

fn workload(args: &Simulate) -> anyhow::Result<Workload> {
    let Some(trace) = &args.trace else {
        ensure!(args.block_tokens > 0, "--block-tokens must be at least 1");
        let conversations = Conversations {
            systems: args.systems,
            turns: args.turns,
            again: args.again,
            system: args.system_tokens,
            question: args.question_tokens,
            answer: args.answer_tokens,
            requests: args.requests.unwrap_or(REQUESTS),
            rate: 1.0,
            block_tokens: args.block_tokens,
            seed: args.seed,
        };
        return Ok(conversations.workload());
    };
    let mut load = Workload::read(trace)?;
    if let Some(requests) = args.requests {
        load.truncate(requests);
    }
    Ok(load)
}

fn study(args: &Simulate) -> anyhow::Result<Study> {
    // Whoever asks for prefill and decode servers wants no others, unless they say so.
    let both = if args.decode > 0 && args.servers == 8 {
        0
    } else {
        args.servers
    };
    ensure!(
        both + args.decode > 0,
        "some server has to answer: --servers or --decode"
    );
    ensure!(
        args.loads.iter().all(|l| l.is_finite() && *l > 0.0),
        "--loads are percentages above 0"
    );
    let mut setup = Setup {
        both,
        prefill: args.prefill,
        decode: args.decode,
        model: model(args)?,
        split: split(&args.split)?,
        scrape_every: micros(args.scrape_interval),
        replace_every: args.replace_every.map(micros),
        seed: args.seed,
        ..Setup::default()
    };
    let costs = [
        (&mut setup.costs.queued, args.cost_queued),
        (&mut setup.costs.active, args.cost_active),
    ];
    for (cost, given) in costs {
        *cost = given.unwrap_or(*cost);
        ensure!(
            cost.is_finite() && *cost >= 0.0,
            "costs are numbers from 0 on"
        );
    }
    let named = |name: &String| {
        let all = Policy::ALL.map(Policy::name).join(", ");
        Policy::named(name).with_context(|| format!("no policy {name}; there are {all}"))
    };
    let policies = if args.policies.is_empty() {
        Policy::ALL.to_vec()
    } else {
        args.policies
            .iter()
            .map(named)
            .collect::<anyhow::Result<_>>()?
    };
    Ok(Study {
        setup,
        blocks: args.blocks.clone(),
        loads: args.loads.iter().map(|l| l / 100.0).collect(),
        policies,
    })
}

fn model(args: &Simulate) -> anyhow::Result<EngineModel> {
    let usual = EngineModel::default();
    let model = EngineModel {
        prefill_rate: args.prefill_rate.unwrap_or(usual.prefill_rate),
        step: args.step_ms.map_or(usual.step, |ms| ms / 1e3),
        batch_tokens: args.batch_tokens.unwrap_or(usual.batch_tokens),
        link: args.link.map_or(usual.link, |gbits| gbits * 1e9 / 8.0),
        ..usual
    };
    let speeds = [model.prefill_rate, model.step, model.link];
    ensure!(
        speeds.iter().all(|x| x.is_finite() && *x > 0.0) && model.batch_tokens > 0,
        "--prefill-rate, --step-ms, --batch-tokens and --link must be above 0"
    );
    Ok(model)
}

fn split(text: &str) -> anyhow::Result<Split> {
    Ok(match text {
        "never" => Split::Never,
        "always" => Split::Always,
        "sooner" => Split::Sooner,
        tokens => match tokens.parse() {
            Ok(tokens) => Split::AtLeast(tokens),
            Err(_) => bail!("--split is never, always, sooner or a number of tokens, not {tokens}"),
        },
    })
}

fn micros(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX).max(1)
}
