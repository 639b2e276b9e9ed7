//! Transcripts: what goes in, what must come out. See `transcript` for the language.

use crate::transcript::check;

#[test]
fn a_prompt_is_computed_in_one_step_and_then_decoded() {
    check(
        "> add a x9 max=3
        > step
        a 0..9+
        > show used
        used 3
        > step 3
        a 9..10+
        a 10..11+
        end a length, cached 0
        idle
        > show used finished generated prompt_tokens iterations
        used 0, finished 1, generated 3, prompt_tokens 9, iterations 3",
    );
}

#[test]
fn chunks_of_a_long_prompt_run_behind_decodes() {
    check(
        "> shape tokens=8 chunk=5
        > add a x3 max=9
        > step
        a 0..3+
        > add b y12 max=2
        > add c z2 max=2
        > step 4
        a 3..4+, b 0..5, c 0..2+
        a 4..5+, c 2..3+, b 5..10
        end c length, cached 0
        a 5..6+, b 10..12+
        a 6..7+, b 12..13+
        end b length, cached 0",
    );
}

#[test]
fn beside_decodes_prompts_get_a_smaller_budget() {
    check(
        "> shape tokens=8 beside=3
        > add a x7 max=4
        > add b y9 max=1
        > add c z2 max=1
        > step 4
        a 0..7+, b 0..1
        a 7..8+, b 1..4
        a 8..9+, b 4..7
        a 9..10+, b 7..9+, c 0..1
        end a length, cached 0
        end b length, cached 0
        > step
        c 1..2+
        end c length, cached 0",
    );
}

#[test]
fn decodes_that_use_up_the_budget_hold_back_prompts() {
    check(
        "> shape tokens=2
        > add a x1 max=3
        > add b y1 max=3
        > add c z3 max=1
        > step
        a 0..1+, b 0..1+
        > show running waiting used
        running 2, waiting 1, used 2
        > step 4
        a 1..2+, b 1..2+
        a 2..3+, b 2..3+
        end a length, cached 0
        end b length, cached 0
        c 0..2
        c 2..3+
        end c length, cached 0",
    );
}

#[test]
fn no_more_sequences_run_than_allowed() {
    check(
        "> shape seqs=2
        > add a x2 max=2
        > add b y2 max=1
        > add c z2 max=1
        > step 2
        a 0..2+, b 0..2+
        end b length, cached 0
        a 2..3+, c 0..2+
        end a length, cached 0
        end c length, cached 0",
    );
}

#[test]
fn a_prompt_takes_the_full_blocks_of_an_earlier_one() {
    check(
        "> add a x9 max=1
        > step
        a 0..9+
        end a length, cached 0
        > add b x6y6 max=1
        > add c x9 max=1
        > step
        b 4..12+, c 8..9+
        end b length, cached 4
        end c length, cached 8
        > show prefix_queries prefix_hits used
        prefix_queries 30, prefix_hits 12, used 0",
    );
}

#[test]
fn a_prompt_found_whole_still_computes_its_last_block() {
    check(
        "> add a x8 max=1
        > step
        a 0..8+
        end a length, cached 0
        > add b x8 max=1
        > step
        b 4..8+
        end b length, cached 4",
    );
}

#[test]
fn without_caching_nothing_is_found() {
    check(
        "> shape uncached
        > add a x9 max=1
        > step
        a 0..9+
        end a length, cached 0
        > add b x9 max=1
        > step
        b 0..9+
        end b length, cached 0
        > show prefix_queries prefix_hits
        prefix_queries 18, prefix_hits 0",
    );
}

#[test]
fn an_answer_is_found_by_the_prompt_that_repeats_it() {
    check(
        "> shape always=120
        > add a x6 max=4
        > step 4
        a 0..6+
        a 6..7+
        a 7..8+
        a 8..9+
        end a length, cached 0
        > add b x10y2 max=1
        > step
        b 8..12+
        end b length, cached 8",
    );
}

#[test]
fn the_block_that_was_free_longest_is_forgotten_first() {
    check(
        "> shape blocks=6
        > add a x9 max=1
        > step
        a 0..9+
        end a length, cached 0
        > add b y9 max=1
        > step
        b 0..9+
        end b length, cached 0
        > add c z13 max=1
        > step
        c 0..13+
        end c length, cached 0
        > add d y9 max=1
        > step
        d 8..9+
        end d length, cached 8
        > add e x9 max=1
        > step
        e 0..9+
        end e length, cached 0",
    );
}

#[test]
fn a_tail_is_forgotten_before_its_prefix() {
    check(
        "> shape blocks=4
        > add a x13 max=1
        > step
        a 0..13+
        end a length, cached 0
        > add b y8 max=1
        > step
        b 0..8+
        end b length, cached 0
        > add c x13 max=1
        > step
        c 8..13+
        end c length, cached 8",
    );
}

#[test]
fn the_youngest_gives_its_blocks_up_and_computes_again() {
    check(
        "> shape blocks=5
        > add a x7 max=4
        > add b y7 max=4
        > step 2
        a 0..7+, b 0..7+
        a 7..8+, b 7..8+
        > show used
        used 4
        > step
        a 8..9+
        > show preemptions waiting used
        preemptions 1, waiting 1, used 3
        > step 4
        a 9..10+
        end a length, cached 0
        b 8..9+
        b 9..10+
        end b length, cached 0
        idle
        > show preemptions prefix_queries prefix_hits used
        preemptions 1, prefix_queries 14, prefix_hits 0, used 0",
    );
}

#[test]
fn one_ends_in_the_step_that_preempts_another() {
    check(
        "> shape blocks=5
        > add a x7 max=3
        > add b y7 max=4
        > step 3
        a 0..7+, b 0..7+
        a 7..8+, b 7..8+
        a 8..9+
        end a length, cached 0
        > show preemptions running waiting
        preemptions 1, running 0, waiting 1
        > step 3
        b 8..9+
        b 9..10+
        end b length, cached 0
        idle",
    );
}

#[test]
fn the_preempted_goes_before_those_that_never_ran() {
    check(
        "> shape blocks=5 seqs=2
        > add a x7 max=4
        > add b y7 max=4
        > add c z1 max=1
        > step 7
        a 0..7+, b 0..7+
        a 7..8+, b 7..8+
        a 8..9+
        a 9..10+
        end a length, cached 0
        b 8..9+, c 0..1+
        end c length, cached 0
        b 9..10+
        end b length, cached 0
        idle",
    );
}

#[test]
fn the_first_in_the_queue_is_not_overtaken() {
    check(
        "> shape blocks=5
        > add a x8 max=2
        > add b y14 max=1
        > add c z1 max=1
        > step 3
        a 0..8+
        a 8..9+
        end a length, cached 0
        b 0..14+, c 0..1+
        end b length, cached 0
        end c length, cached 0",
    );
}

#[test]
fn a_sequence_may_be_cancelled_wherever_it_is() {
    check(
        "> shape seqs=3 tokens=5 chunk=4
        > add a x9 max=5
        > add b y9 max=5 import=9
        > add c z3 max=5
        > add d w3 max=5
        > step
        a 0..4, c 0..1
        fetch b 0+2
        > show running awaiting waiting used
        running 2, awaiting 1, waiting 1, used 7
        > cancel d
        > cancel a
        > show running awaiting waiting used
        running 1, awaiting 1, waiting 0, used 4
        > cancel b
        > step
        c 1..3+
        > cancel c
        > show running awaiting waiting used
        running 0, awaiting 0, waiting 0, used 0
        > cancel c
        > step
        idle",
    );
}

#[test]
fn what_arrives_is_not_computed() {
    check(
        "> add a x10 max=2 import=10
        > step 2
        fetch a 0+3
        idle
        > show awaiting used
        awaiting 1, used 3
        > arrive a
        > step 2
        a 9..10+
        a 10..11+
        end a length, cached 9
        > show external_queries external_hits prompt_tokens used
        external_queries 9, external_hits 9, prompt_tokens 1, used 0",
    );
}

#[test]
fn a_block_for_the_last_token_alone_is_not_fetched() {
    check(
        "> add a x9 max=1 import=9
        > step
        fetch a 0+2
        > arrive a
        > step
        a 8..9+
        end a length, cached 8",
    );
}

#[test]
fn what_is_missing_after_an_arrival_is_computed() {
    check(
        "> add a x14 max=1 import=14
        > step
        fetch a 0+4
        > arrive a 2
        > step
        a 8..14+
        end a length, cached 8
        > show external_queries external_hits
        external_queries 13, external_hits 8",
    );
}

#[test]
fn a_peer_may_hold_less_than_the_prompt() {
    check(
        "> add a x14 max=1 import=6
        > step
        fetch a 0+2
        > arrive a
        > step
        a 6..14+
        end a length, cached 6",
    );
}

#[test]
fn a_peer_that_claims_more_than_the_prompt_is_asked_for_the_prompt() {
    check(
        "> add a x7 max=1 import=4000000000
        > step
        fetch a 0+2
        > arrive a
        > step
        a 6..7+
        end a length, cached 6",
    );
}

#[test]
fn everything_is_computed_when_nothing_arrives() {
    check(
        "> add a x10 max=1 import=10
        > add b y10 max=1 import=10
        > step
        fetch a 0+3
        fetch b 0+3
        > fail a
        > arrive b 0
        > step
        a 0..10+, b 0..10+
        end a length, cached 0
        end b length, cached 0",
    );
}

#[test]
fn only_what_is_not_here_is_fetched() {
    check(
        "> add a x8y1 max=1
        > step
        a 0..9+
        end a length, cached 0
        > add b x8z8 max=1 import=16
        > add c x9 max=1 import=9
        > step
        c 8..9+
        fetch b 2+2
        end c length, cached 8
        > arrive b
        > step
        b 15..16+
        end b length, cached 15",
    );
}

#[test]
fn fetched_blocks_are_found_by_the_next_prompt() {
    check(
        "> add a x9 max=1 import=9
        > step
        fetch a 0+2
        > arrive a
        > add b x9 max=1
        > step
        a 8..9+, b 8..9+
        end a length, cached 8
        end b length, cached 8",
    );
}

#[test]
fn what_was_preempted_is_not_fetched_any_more() {
    check(
        "> shape blocks=4 size=2
        > add a x3 max=1
        > step
        a 0..3+
        end a length, cached 0
        > add b y3 max=5
        > add c x3 max=3 import=3
        > step 7
        b 0..3+, c 2..3+
        b 3..4+, c 3..4+
        b 4..5+
        b 5..6+
        b 6..7+
        end b length, cached 0
        c 0..5+
        end c length, cached 2
        idle",
    );
}

#[test]
fn an_arrival_after_a_cancel_changes_nothing() {
    check(
        "> shape blocks=3
        > add a x9 max=1 import=9
        > step
        fetch a 0+2
        > cancel a
        > show used
        used 0
        > add b y9 max=2
        > step
        b 0..9+
        > arrive a
        > fail a
        > step
        b 9..10+
        end b length, cached 0",
    );
}

#[test]
fn a_decode_waits_for_blocks_that_await_kv() {
    check(
        "> shape blocks=5
        > add a x7 max=4
        > step
        a 0..7+
        > add b y10 max=1 import=10
        > step 3
        a 7..8+
        fetch b 0+3
        idle
        idle
        > show running waiting awaiting preemptions
        running 0, waiting 1, awaiting 1, preemptions 1
        > arrive b
        > step 4
        b 9..10+
        end b length, cached 9
        a 8..9+
        a 9..10+
        end a length, cached 0
        idle",
    );
}

#[test]
fn the_export_comes_before_the_first_token() {
    check(
        "> add a x9 max=1 export
        > add b y4 max=2 export
        > step 2
        a 0..9+, b 0..4+
        export a 9 in 3
        end a length, cached 0
        export b 4 in 1
        b 4..5+
        end b length, cached 0
        > show used
        used 0",
    );
}

#[test]
fn the_end_of_a_prompt_that_leaves_is_computed_alone() {
    check(
        "> shape tokens=12 tail=4
        > add a x22 max=1 export
        > step
        a 0..12
        export a 12 in 3
        > add b y20 max=1
        > step
        a 12..16, b 0..8
        export a 16 in 1
        > step
        a 16..22+
        export a 22 in 2
        end a length, cached 0
        > step
        b 8..20+
        end b length, cached 0",
    );
    // Neither short prompts nor those that stay are cut.
    check(
        "> shape tokens=12 tail=4
        > add a x7 max=1 export
        > step
        a 0..7+
        export a 7 in 2
        end a length, cached 0
        > add b y12 max=1
        > step
        b 0..12+
        end b length, cached 0",
    );
}

#[test]
fn what_a_chunk_finishes_leaves_while_the_next_is_computed() {
    check(
        "> shape tokens=6
        > add a x13 max=1 export
        > step 3
        a 0..6
        export a 4 in 1
        a 6..12
        export a 12 in 2
        a 12..13+
        export a 13 in 1
        end a length, cached 0
        > add b x13 max=1 export
        > step
        b 12..13+
        export b 13 in 4
        end b length, cached 12",
    );
}

#[test]
fn an_answer_ends_at_max_tokens() {
    check(
        "> add a x2 max=1
        > step
        a 0..2+
        end a length, cached 0",
    );
}

#[test]
fn an_end_token_ends_the_answer() {
    check(
        "> shape always=7
        > add a x2 eos=7
        > add b y2 stop=7
        > add c z2 eos=7 stop=7
        > add d w2 eos=7 stop=7 ignore_eos
        > add e v2 eos=7 ignore_eos max=2
        > step 2
        a 0..2+, b 0..2+, c 0..2+, d 0..2+, e 0..2+
        end a eos, cached 0
        end b stop 7, cached 0
        end c eos, cached 0
        end d stop 7, cached 0
        e 2..3+
        end e length, cached 0",
    );
}

#[test]
fn no_token_ends_the_answer_before_min_tokens() {
    check(
        "> shape always=7
        > add a x2 eos=7 min=2
        > add b y2 stop=7 min=2
        > add c y2 stop=7 min=2 max=1
        > step 2
        a 0..2+, b 0..2+, c 0..2+
        end c length, cached 0
        a 2..3+, b 2..3+
        end a eos, cached 0
        end b stop 7, cached 0",
    );
}

#[test]
fn a_full_context_ends_the_answer() {
    check(
        "> shape len=6
        > add a x4
        > step 2
        a 0..4+
        a 4..5+
        end a length, cached 0",
    );
}

#[test]
fn a_full_pool_ends_the_answer() {
    check(
        "> shape blocks=2
        > add a x6
        > step 2
        a 0..6+
        a 6..7+
        end a length, cached 0
        > show used
        used 0",
    );
}

#[test]
fn what_cannot_run_is_refused() {
    check(
        "> shape blocks=2 waiting=2
        > add a x8
        refused: the prompt has 8 tokens, and 8 with at least one of the answer fit
        > add a x7 max=0
        refused: the prompt is empty or no token is asked for
        > add a x7
        > add a x7
        refused: a sequence of this id is live
        > add b y1
        > add c z1
        refused: 2 sequences are waiting already
        > step
        a 0..7+
        end a length, cached 0
        > add c z1",
    );
}
