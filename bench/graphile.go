package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/pglistener/pglistener/internal/benchside"
)

// graphile: jobs that do nothing, against graphile-worker with the settings of its own performance test.
func (b *bench) graphile() error {
	if !b.installGraphile() {
		return nil
	}
	const jobs = 100_000
	rates := map[string][]float64{}
	for range 3 {
		if err := b.fill(jobs); err != nil {
			return err
		}
		r, err := b.drain(benchside.Task{Side: "ours", Channels: []string{"bench"}, N: jobs, Workers: 24}, "select count(*) from outbox")
		if err != nil {
			return err
		}
		rates["ours"] = append(rates["ours"], jobs/r)
		if err := b.fillGraphile(jobs); err != nil {
			return err
		}
		if r, err = b.drain(benchside.Task{Side: "graphile", N: jobs}, "select count(*) from graphile_worker._private_jobs"); err != nil {
			return err
		}
		rates["graphile"] = append(rates["graphile"], jobs/r)
	}
	b.compare("outbox jobs, 24 at once, against graphile-worker with a local queue of 500 and batched completion", rates["ours"], rates["graphile"], 3)
	return nil
}

// installGraphile installs the npm package and makes its tables; false and a line of the table if that is not possible.
func (b *bench) installGraphile() bool {
	if b.graphileAt != "" {
		return true
	}
	at, err := filepath.Abs(filepath.Join(filepath.Dir(b.program), "graphile", "node_modules", "graphile-worker"))
	if err == nil {
		var out []byte
		if out, err = exec.Command("sh", "bench/graphile/install.sh").CombinedOutput(); err != nil {
			err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(out))
		}
	}
	if err == nil {
		migrate := graphileCommand(at)
		migrate.Env = append(os.Environ(), "DATABASE_URL="+b.server.DSN())
		migrate.Stderr = os.Stderr
		err = migrate.Run()
	}
	if err != nil {
		b.line(fmt.Sprintf("graphile-worker: skipped (%v)", err), "", "", "", "", false)
		return false
	}
	b.graphileAt = at
	return true
}

func graphileCommand(at string) *exec.Cmd {
	return exec.Command("node", "bench/graphile/worker.js", at)
}

// insertGraphile inserts n jobs in one statement. One that carries its time has seconds in payload.t.
const insertGraphile = `select count(*) from graphile_worker.add_jobs(array(
	select json_populate_record(null::graphile_worker.job_spec, json_build_object('identifier', 'noop', 'payload', $1::json))
	from generate_series(1, $2::int)))`

// fillGraphile empties graphile-worker's tables and inserts n jobs.
func (b *bench) fillGraphile(n int) error {
	if err := b.exec("truncate graphile_worker._private_jobs"); err != nil {
		return err
	}
	for ; n > 0; n -= 10_000 {
		if err := b.exec(insertGraphile, "{}", min(n, 10_000)); err != nil {
			return err
		}
	}
	return b.exec("vacuum analyze graphile_worker._private_jobs")
}
