//! Statistics on disk: what is written is read back exactly, and nothing else is read. The commands that make them.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use amax::statistics::{SiteStatistics, Statistics};

fn sample_values(seed: u32, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).max(1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    };
    (0..count).map(|_| (next() as f32 / u32::MAX as f32 - 0.4) * ((next() % 40) as f32 - 20.0).exp2()).collect()
}

/// Statistics with everything that can be in them.
fn statistics(ran: impl Iterator<Item = u32>) -> Statistics {
    let mut found = Statistics::default();
    found.model_hash = "a".repeat(64);
    found.samples_hash = "b".repeat(64);
    "every float activation".clone_into(&mut found.asked);
    found.sample_total = 12;
    found.unobserved.insert("quoted \"name\"".to_owned(), "is a string\n".to_owned());
    let site = |found: &mut Statistics, name: &str, axis: Option<isize>| {
        let fresh = axis.map_or_else(SiteStatistics::new, SiteStatistics::per_channel);
        found.sites.entry(name.to_owned()).or_insert(fresh);
    };
    for (name, axis) in [("x", None), ("/a/b:c é", Some(1)), ("ragged", Some(-1)), ("nan", Some(0)), ("empty", None)] {
        site(&mut found, name, axis);
    }
    for index in ran {
        found.ran.push(index);
        found.sample_count += 1;
        let mut see = |name: &str, dims: &[usize], values: &[f32]| {
            found.sites.get_mut(name).unwrap().observe_tensor(index, dims, values);
        };
        let mut values = sample_values(index + 1, 600);
        see("x", &[600], &values);
        see("ragged", &[2, index as usize + 2], &values[..2 * (index as usize + 2)]);
        values[7] = f32::NAN;
        values[8] = f32::NEG_INFINITY;
        see("/a/b:c é", &[2, 3, 100], &values);
        see("nan", &[2], &[f32::NAN; 2]);
        see("empty", &[0], &[]);
    }
    found
}

#[test]
fn files_give_back_what_was_written() {
    let check = |statistics: &Statistics| {
        let bytes = statistics.to_bytes();
        let back = Statistics::from_bytes(&bytes).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(&back, statistics);
        assert_eq!(back.to_bytes(), bytes);
        bytes
    };
    check(&Statistics::default());
    check(&statistics(0..0));
    check(&statistics(0..12));
    check(&statistics([0, 1, 2, 5, 9, 10].into_iter()));
    let folder = crate::support::folder();
    let path = folder.path().join("a b.safetensors");
    let one = statistics(0..3);
    one.save(&path).unwrap();
    one.save(&path).unwrap();
    assert_eq!(Statistics::load(&path).unwrap(), one);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn shards_merge_to_the_file_of_one_run() {
    let whole = statistics(0..12).to_bytes();
    for parts in [2, 3, 5, 12] {
        let shard = |part: usize| statistics((0..12).skip(part).step_by(parts));
        let files: Vec<Vec<u8>> = (0..parts).map(|part| shard(part).to_bytes()).collect();
        let mut all = Statistics::from_bytes(&files[parts / 2]).unwrap();
        for (at, bytes) in files.iter().enumerate().rev() {
            if at != parts / 2 {
                all.merge(&Statistics::from_bytes(bytes).unwrap()).unwrap();
            }
        }
        assert!(all.to_bytes() == whole, "{parts} shards");
    }
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let check = |edit: &dyn Fn(&mut Statistics), why: &str| {
        let (mut one, mut other) = (statistics(0..6), statistics(6..12));
        edit(&mut other);
        let before = one.clone();
        let error = one.merge(&other).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
        assert_eq!(one, before, "{why}");
    };
    check(&|s| s.model_hash = "c".repeat(64), "different models");
    check(&|s| s.samples_hash = "c".repeat(64), "different sample sets");
    check(&|s| s.sample_total = 13, "different sample sets");
    check(&|s| s.asked = "less".to_owned(), "observed every float activation, the other less");
    check(&|s| drop(s.sites.remove("x")), "did not observe this tensor");
    check(&|s| *s = statistics(5..12), "both parts ran sample 5");
}

/// Replaces text in the header and makes the length fit.
fn with_header(bytes: &[u8], from: &str, to: &str) -> Vec<u8> {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = std::str::from_utf8(&bytes[8..8 + length]).unwrap();
    assert!(header.contains(from), "{header}");
    let header = header.replacen(from, to, 1);
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &bytes[8 + length..]].concat()
}

#[test]
fn other_files_are_refused() {
    let whole = statistics(0..4).to_bytes();
    let check = |bytes: &[u8], why: &str| {
        let error = Statistics::from_bytes(bytes).expect_err(why).to_string();
        assert!(error.contains(why), "{error}, not {why}");
    };
    check(b"", "not a statistics file");
    check(b"PK\x03\x04 some other file", "not a statistics file");
    check(&[0xff; 64], "not a statistics file");
    check(&whole[..100], "ends before");
    check(&whole[..whole.len() - 1], "ends before");
    check(&[&whole[..], b"more"].concat(), "4 bytes follow");
    let header = |from: &str, to: &str, why: &str| check(&with_header(&whole, from, to), why);
    header("amax statistics", "weights", "does not hold statistics");
    header("\"schema\":\"1\"", "\"schema\":\"2\"", "version 2");
    header("\"dtype\":\"I64\"", "\"dtype\":\"Q9\"", "header cannot be read");
    header("\"dtype\":\"I64\"", "\"dtype\":\"F64\"", "another type");
    header("\"samples_run\":\"0-3\"", "\"samples_run\":\"0-2\"", "sample 3, which was not run");
    header("\"samples_run\":\"0-3\"", "\"samples_run\":\"3-0\"", "does not name samples");
    header("\"samples_run\":\"0-3\"", "\"samples_run\":\"0-4294967295\"", "does not name samples");
    header("\"samples_run\":\"0-3\"", "\"samples_run\":\"0-1,2-3\"", "as amax writes it");
    header("{\"__meta", "{ \"__meta", "as amax writes it");
    header("\"totals:x\"", "\"totals:y\"", "is missing");
    header("\"shape\":[2]", "\"shape\":[18446744073709551615,18446744073709551615]", "not where it should be");
    header("\"unobserved\":\"{", "\"unobserved\":\"[", "unobserved");
    let mut flipped = whole.clone();
    let last = flipped.len() - 1;
    flipped[last] ^= 1;
    check(&flipped, "hash");
}

/// Whatever happens to a file, reading it is no panic, and what is accepted is what was written.
#[test]
fn damage_is_found() {
    let whole = statistics(0..2).to_bytes();
    let original = Statistics::from_bytes(&whole).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for at in (0..header).step_by(7).chain((header..whole.len()).step_by(4001)) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        if let Ok(read) = Statistics::from_bytes(&bytes) {
            // A changed letter in a hash or a name of the header is another file, but a sound one.
            assert!(read != original && read.to_bytes() == bytes, "byte {at}");
        }
        assert!(Statistics::from_bytes(&whole[..at]).is_err(), "cut at {at}");
    }
}

/// The commands.
#[cfg(feature = "tract")]
mod commands {

    use amax::ir::content_hash;
    use amax::observe::Run;
    use amax::observe::calibrate::{Checkpoint, Observation, prepare, sites};
    use amax::statistics::Statistics;

    use crate::support::{amax, digits, fail, root, succeed};

    fn folder() -> tempfile::TempDir {
        let folder = crate::support::folder();
        for name in ["digits.onnx", "digits.calib.npz"] {
            std::fs::copy(root("models").join(name), folder.path().join(name)).unwrap();
        }
        folder
    }

    #[test]
    fn threads_and_shards_give_one_file() {
        let folder = folder();
        let at = folder.path();
        let read = |name: &str| std::fs::read(at.join(name)).unwrap();
        succeed(at, "calibrate digits.onnx -o one --threads 1");
        succeed(at, "calibrate digits.onnx -o two --threads 2");
        succeed(at, "calibrate digits.onnx -o seven --threads 7 --resume");
        assert!(read("one") == read("two") && read("one") == read("seven"));
        for part in 1..=3 {
            succeed(at, &format!("calibrate digits.onnx --calib digits.calib.npz -o part{part} --shard {part}/3"));
        }
        succeed(at, "merge part2 part3 part1 -o merged");
        assert!(read("one") == read("merged"));
        fail(at, "merge part2 part2 -o twice", 4, "both parts ran sample 1");
        fail(at, "calibrate digits.onnx -o x --shard 4/3", 2, "I from 1 to N");
        // An array of jobs may be larger than the set.
        succeed(at, "calibrate digits.onnx -o none --shard 65/65");
        succeed(at, "merge part2 none part3 part1 -o merged");
        assert!(read("one") == read("merged"));
        let says = |words: &str, lost: bool| {
            let said = String::from_utf8(amax(at, words).stderr).unwrap();
            let expected = "warning: 21 of 64 samples are in none of the parts";
            assert_eq!(said.contains(expected), lost, "{words}: {said}");
        };
        says("merge part3 none part1 -o lost", true);
        says("rewrite digits.onnx out.onnx --stats lost", true);
        says("merge part3 part2 part1 -o merged", false);
        says("calibrate digits.onnx -o part --shard 1/3", false);
        succeed(at, "calibrate digits.onnx -o held --hold-out");
        says("rewrite digits.onnx out.onnx --stats held", false);
        fail(at, "calibrate digits.onnx -o digits.onnx", 6, "");
        fail(at, "calibrate digits.onnx -o x --calib none", 2, "no samples");
        let whole = Statistics::load(at.join("one")).unwrap();
        assert_eq!((whole.sample_count, whole.sample_total, whole.ran.len()), (64, 64, 64));
        assert!(whole.sites.contains_key("image") && whole.sites.contains_key("logits") && whole.sites.len() > 10);
        assert_eq!(whole.sites["image"].channels().unwrap().ranges().len(), 1);
    }

    #[test]
    fn a_rewrite_from_statistics_is_the_rewrite_from_the_samples() {
        let folder = folder();
        let at = folder.path();
        let read = |name: &str| std::fs::read(at.join(name)).unwrap();
        succeed(at, "calibrate digits.onnx -o stats --hold-out");
        succeed(at, "rewrite digits.onnx direct.onnx");
        succeed(at, "rewrite digits.onnx from.onnx --stats stats");
        succeed(at, "rewrite digits.onnx blind.onnx --stats stats --calib none");
        succeed(at, "calibrate digits.onnx -o planned --hold-out --planned");
        succeed(at, "rewrite digits.onnx planned.onnx --stats planned --calib none");
        assert!(read("from.onnx") == read("direct.onnx"));
        // What biases make up for takes samples.
        succeed(at, "rewrite digits.onnx ranges.onnx --algorithm none");
        for name in ["blind.onnx", "planned.onnx"] {
            assert!(read(name) == read("ranges.onnx"), "{name}");
        }
        fail(at, "rewrite direct.onnx x.onnx --stats stats", 4, "of another model");
        fail(at, "rewrite digits.onnx x.onnx --stats digits.onnx", 4, "not a statistics file");
        fail(at, "rewrite digits.onnx x.onnx --stats nowhere", 4, "no such file");
        fail(
            at,
            "merge stats planned -o x",
            4,
            "observed every float activation, the other what a plan for ort-cpu asks for",
        );
        assert!(!at.join("x.onnx").exists() && !at.join("x").exists());
    }

    /// A run that stops after some samples is continued to the same bytes, in this process and in another.
    #[test]
    fn interrupted_runs_go_on_to_the_same_bytes() {
        let folder = folder();
        let at = folder.path();
        succeed(at, "calibrate digits.onnx -o whole");
        let whole = std::fs::read(at.join("whole")).unwrap();
        let (model, samples) = digits();
        let prepared = prepare(&model, &amax::runtime::TractEvaluate, true).unwrap();
        let wanted = sites(&prepared);
        let indices: Vec<usize> = (0..samples.len()).collect();
        let saved = std::sync::Mutex::new(Vec::new());
        let save = |state: &Statistics| {
            saved.lock().unwrap().push(state.to_bytes());
            Ok(())
        };
        let observation = |threads| Observation {
            model: &prepared,
            sites: &wanted,
            run: Run { threads, ..Run::new(&samples, &indices) },
            checkpoint: Some(Checkpoint { every: std::time::Duration::ZERO, save: &save }),
        };
        let mut start = Statistics::default();
        start.model_hash = content_hash(&model);
        start.samples_hash = samples.content_hash().unwrap();
        start.asked = "every float activation".to_owned();
        start.sample_total = 64;
        assert!(observation(1).run(start).unwrap().to_bytes() == whole);
        let states = std::mem::take(&mut *saved.lock().unwrap());
        assert_eq!(states.len(), 64);
        for (number, state) in states.iter().enumerate().step_by(21) {
            let state = Statistics::from_bytes(state).unwrap();
            assert!(observation(3).run(state).unwrap().to_bytes() == whole, "state {number}");
        }
        std::fs::write(at.join("out.partial"), &states[5]).unwrap();
        let output = amax(at, "calibrate digits.onnx -o out --resume");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("continuing after"), "{said}");
        assert!(std::fs::read(at.join("out")).unwrap() == whole);
        assert!(!at.join("out.partial").exists());

        std::fs::write(at.join("out.partial"), &states[5]).unwrap();
        fail(at, "calibrate digits.onnx -o out --resume --planned", 4, "what a plan for ort-cpu asks for");
        fail(at, "calibrate digits.onnx -o out --resume --shard 1/60", 4, "another --shard");
        std::fs::write(at.join("out.partial"), &states[5][..500]).unwrap();
        std::fs::remove_file(at.join("out")).unwrap();
        let output = amax(at, "calibrate digits.onnx -o out --resume");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("out.partial is damaged"), "{said}");
        assert!(std::fs::read(at.join("out")).unwrap() == whole);
        assert!(std::fs::read(at.join("out.damaged")).unwrap() == states[5][..500]);
    }

    #[test]
    fn the_report_says_what_ranges_rest_on() {
        let folder = folder();
        let at = folder.path();
        let text = succeed(at, "calibrate digits.onnx -o stats --report -q");
        assert!(text.contains("64 samples, minmax: "), "{text}");
        assert!(succeed(at, "merge stats --report -v").lines().count() > text.lines().count());
        let json = succeed(at, "merge stats --report --json --observer percentile=99");
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["samples"], 64);
        let clipped = json["sites"]["logits"]["clipped"].as_f64().unwrap();
        assert!((0.005..0.015).contains(&clipped), "{clipped}");
        fail(at, "merge stats", 2, "--output");
        fail(at, "merge stats --report --observer mes", 2, "did you mean mse");
        fail(at, "merge stats --report --observer percentile=0", 2, "above 50");
    }
}
