// graphile-worker as a side of make bench: see internal/benchside. PGLISTENER_BENCH is the task; argv[2] is where the package is.
// Without a task it makes the tables.
"use strict";
const { run, runMigrations } = require(process.argv[2]);
const { Logger } = require(process.argv[2]);

const t = JSON.parse(process.env.PGLISTENER_BENCH || "{}");
const quiet = new Logger(() => () => {});

async function main() {
	if (!t.Side) {
		await runMigrations({ connectionString: process.env.DATABASE_URL, logger: quiet });
		return;
	}
	let n = 0, first, end;
	const all = new Promise((resolve) => { end = resolve; });
	const noop = (payload) => {
		if (payload.t) console.log(JSON.stringify({ Max: (performance.timeOrigin + performance.now()) / 1000 - payload.t }));
		if (n++ === 0) first = performance.now();
		if (n === t.N) end();
	};
	// The settings of its own performance test.
	await run({ preset: { worker: {
		connectionString: t.DSN, concurrentJobs: 24, maxPoolSize: 25, pollInterval: 2000, logger: quiet,
		localQueue: { size: 500 }, completeJobBatchDelay: 0, failJobBatchDelay: 0,
	} }, taskList: { noop }, noHandleSignals: true });
	console.log("ready");
	await all;
	console.log(JSON.stringify({ Seconds: (performance.now() - first) / 1000 }));
}

if (t.Side) process.stdin.resume().on("end", () => process.exit(0));
main().then(() => { if (!t.Side) process.exit(0); }, (err) => { console.error(err); process.exit(1); });
