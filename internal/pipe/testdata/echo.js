#!/usr/bin/env node
const fs = require("fs")
const lines = require("readline").createInterface({ input: process.stdin })
lines.on("line", (line) => {
  const event = JSON.parse(line)
  let answer = { id: event.id, ok: true }
  try {
    fs.appendFileSync(process.argv[2], event.payload + "\n") // the work
  } catch (e) {
    answer = { id: event.id, error: e.message } // comes again
  }
  console.log(JSON.stringify(answer))
})
