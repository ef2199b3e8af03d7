// A receiver as its authors would write it with the library of Standard Webhooks: it answers 204 to what the
// library verifies, and 401 with the reason to all else. It prints its port, and ends with its stdin.
// Usage: node receiver.js MODULE SECRET
const http = require("http");
const { Webhook } = require(process.argv[2]);
const webhook = new Webhook(process.argv[3]);

const server = http.createServer((req, res) => {
  const body = [];
  req.on("data", (piece) => body.push(piece));
  req.on("end", () => {
    try {
      webhook.verify(Buffer.concat(body).toString(), req.headers, { jsonParse: false });
      res.writeHead(204).end();
    } catch (err) {
      res.writeHead(401).end(err.name + ": " + err.message);
    }
  });
});
server.listen(0, "127.0.0.1", () => console.log(server.address().port));
process.stdin.on("end", () => process.exit(0)).resume();
